"""Parts for every package: errors, names, files, the registry of parts, counts of weights.

Imports no other package of robsparse and no torch.
"""
