"""The only place that knows jaxprs: what a network computes, and running it with another backward pass."""
