"""What every package uses: errors, names, the registry of parts, counts of weights.

Imports no other package of robsparse and no torch.
"""
