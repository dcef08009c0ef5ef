"""One network under attack: the attack interface, the sanity checks and the record.

Imports fast and what is below it; never training.
"""
