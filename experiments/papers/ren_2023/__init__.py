"""Ren, Kornblith, Liao and Hinton, Scaling forward gradient with local losses (2023)."""
