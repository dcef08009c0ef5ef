"""Bayesian connectivity sampling, the method that this suite is built around."""
