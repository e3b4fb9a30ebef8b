"""Everything that needs a GPU, in one program: see `__main__.py`."""
