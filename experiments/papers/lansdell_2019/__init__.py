"""Lansdell, Prakash and Kording, Learning to solve the credit assignment problem (2019)."""
