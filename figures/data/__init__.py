"""Numbers behind tables and plots: tidy tables, summaries, comparisons, statistics.

Imports the study and the collected tables, and nothing else of robsparse.figures.
"""
