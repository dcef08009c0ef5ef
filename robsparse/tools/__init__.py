"""Commands beside training and evaluation: benchmarks, planning, a new method, export.

Imports anything but cli.
"""
