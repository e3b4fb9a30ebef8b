"""Baldi, Sadowski and Lu, Learning in the machine: random backpropagation and the deep learning channel (2018)."""
