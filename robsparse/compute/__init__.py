"""Parts of both training and evaluation: device, precision, random numbers, perturbations.

Imports only base.
"""
