"""A run from outside: callbacks, metrics, early stopping, resuming."""
