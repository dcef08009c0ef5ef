"""What training and evaluation share: device, precision, random numbers, perturbations.

Imports base alone.
"""
