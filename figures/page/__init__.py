"""The page of a study: one HTML file that works offline.

Imports robsparse.figures.data, .plots, .tables and .text.
"""
