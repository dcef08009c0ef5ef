"""The command line.

Imports anything, late, so that a command starts fast.
"""
