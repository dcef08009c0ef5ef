"""Tables of a study and of papers, as Markdown, LaTeX and CSV.

Imports robsparse.figures.data and .text, never plots.
"""
