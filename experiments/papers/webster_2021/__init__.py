"""Webster, Choi and Ahn, Learning the connections in direct feedback alignment (2021)."""
