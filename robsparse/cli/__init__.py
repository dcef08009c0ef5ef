"""The command line.

Imports every package, but only when a command needs it: a command starts fast.
"""
