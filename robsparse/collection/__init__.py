"""Collects the records of a study into tables and checks that they belong together.

Imports study and the packages below it, and no torch.
"""
