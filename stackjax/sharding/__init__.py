"""Axis names of arrays, the device mesh, and partitions."""
