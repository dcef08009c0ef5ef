"""One network under attack: the attack interface, the sanity checks and the record.

Imports fast, networks and what is below them; never training.
"""
