"""The training loop, with its stages, objectives, batches and checkpoints.

Imports fast and the packages below it, and never evaluation.
"""
