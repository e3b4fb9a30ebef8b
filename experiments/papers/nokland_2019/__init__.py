"""Nokland and Eidnes, Training neural networks with local error signals (2019)."""
