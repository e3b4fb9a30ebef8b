"""Hoier and Zach, Two tales of single-phase contrastive Hebbian learning (2024)."""
