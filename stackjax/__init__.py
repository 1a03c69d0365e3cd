"""Pretraining of language models that grow while they train."""
