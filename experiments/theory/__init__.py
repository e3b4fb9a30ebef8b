"""The papers' theorems, runnable: `python -m experiments.theory` checks and plots them all."""
