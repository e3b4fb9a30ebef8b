"""Training on many devices beyond what `experiments.train` does: pipelines of stages."""
