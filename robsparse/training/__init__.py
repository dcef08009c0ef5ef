"""The one training loop, its stages, objectives, batches and checkpoints.

Imports fast, networks and what is below them; never evaluation.
"""
