"""One config file, read, checked and resolved into cells, and the fingerprints of its results.

Imports base, schema and records and no torch.
"""
