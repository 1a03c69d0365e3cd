"""Measurements of a run: each one function that returns what it found, or why it did not."""
