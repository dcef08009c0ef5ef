"""Sparse convolutions on a CPU, in C: only the active weights are multiplied.

`geometry` says how a convolution reads its map, `patterns` has the active weights and calls the
kernels, `library` finds the compiled module.
"""
