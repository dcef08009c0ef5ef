"""The one training loop, its stages, objectives, batches and checkpoints.

Imports fast and what is below it; never evaluation.
"""
