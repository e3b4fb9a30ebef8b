"""Akrout, Wilson, Humphreys, Lillicrap and Tweed, Deep learning without weight transport (2019)."""
