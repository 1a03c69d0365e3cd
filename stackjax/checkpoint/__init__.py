"""Checkpoints: save, restore, describe, and grow outside a run."""
