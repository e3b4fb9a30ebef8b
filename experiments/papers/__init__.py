"""The experiments of the papers, repeated: one program for each paper."""
