"""The NumPy backend of nibs: runs anywhere, and is meant to be read and copied."""
