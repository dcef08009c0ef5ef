"""The same outputs and input gradients as a network gives, sooner.

Imports models, compute and what is below them.
"""
