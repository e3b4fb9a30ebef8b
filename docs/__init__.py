"""The documentation; `generate` makes its pictures and tables."""
