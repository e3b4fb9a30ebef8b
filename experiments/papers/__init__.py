"""What the papers report of their experiments, measured: one program a section."""
