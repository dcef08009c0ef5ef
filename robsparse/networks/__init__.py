"""Builds networks, reads and writes weights, and imports external models.

Imports models, datasets, sparsity and what is below them.
"""
