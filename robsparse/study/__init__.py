"""Reads, checks and resolves a config file into cells; computes fingerprints of results.

Imports records and the packages below it, and no torch.
"""
