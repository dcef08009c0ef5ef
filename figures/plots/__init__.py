"""Plots: one function for each plot, and the style that all plots share.

Imports robsparse.figures.data and .text, never tables.
"""
