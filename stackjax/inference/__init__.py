"""Inference with trained models: loading, text generation, scoring and evaluation."""
