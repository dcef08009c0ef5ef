"""Commands beside training and evaluation: benchmarks, planning, a new method's file, export.

Imports anything but cli.
"""
