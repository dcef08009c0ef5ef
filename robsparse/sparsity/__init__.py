"""Prunable layers, budgets, masks, scores, rewiring and the history of connections.

Imports compute and what is below it.
"""
