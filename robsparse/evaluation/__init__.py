"""The evaluation of a network: the attack interface, the sanity checks and the record.

Imports fast and the packages below it, and never training.
"""
