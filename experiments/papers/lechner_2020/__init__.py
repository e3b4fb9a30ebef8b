"""Lechner, Learning representations for binary-classification without backpropagation (2020)."""
