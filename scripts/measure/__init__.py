"""Measurements: each function returns numbers, or a reason for missing numbers."""
