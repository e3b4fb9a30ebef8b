"""Scellier and Bengio, Equilibrium propagation (2017)."""
