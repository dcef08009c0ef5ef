"""Text around the numbers: formatting of values, notes under tables, captions of plots.

Imports robsparse.figures.data, never tables or plots.
"""
