"""One config file, read, checked and resolved into cells; the fingerprints of its results.

Imports records and what is below it and no torch.
"""
