"""The theorems of the papers, measured and plotted: `python -m experiments.theory`."""
