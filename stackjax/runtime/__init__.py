"""Hosts, processes, errors and command lines."""
