"""Gives the outputs and input gradients of a network in less time.

Imports networks and what is below it.
"""
