"""Explicit float64 NumPy versions of every rule, written from the papers, to test the library against.

Nothing here imports JAX or the library, and nothing is differentiated automatically: each file states its equations and
computes them with plain loops over layers. `nets` describes the networks, `losses` makes the output errors.
"""
