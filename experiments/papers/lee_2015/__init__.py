"""Lee, Zhang, Fischer and Bengio, Difference target propagation (2015)."""
