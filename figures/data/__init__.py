"""Numbers for tables and plots: tidy tables, summaries, comparisons, statistics.

Imports no other package of robsparse.figures.
"""
