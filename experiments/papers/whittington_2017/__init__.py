"""Whittington and Bogacz, An approximation of the error backpropagation algorithm (2017)."""
