"""Builds a network, reads and writes its weights, and opens external models.

Imports models, datasets, sparsity and what is below them.
"""
