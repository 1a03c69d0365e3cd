"""The training run: loop, hooks, metrics, early stopping, resuming."""
