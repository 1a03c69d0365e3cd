"""Trained models: loaded, sampled, scored and evaluated."""
