"""Checkpoints: saved, restored, described, and grown outside of a run."""
