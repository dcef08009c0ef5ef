"""Repairs of two dependencies, each in one file; nothing else here imports them directly."""
