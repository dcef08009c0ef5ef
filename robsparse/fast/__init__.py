"""Computes the outputs and input gradients of a network faster.

Imports networks and the packages below it.
"""
