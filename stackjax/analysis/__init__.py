"""Comparing and planning runs."""
