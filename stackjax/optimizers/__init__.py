"""Optimizers as values: AdamW, Muon, and a base class for others."""

from stackjax.optimizers.adamw import MAX_BFLOAT16_DECAY, AdamW
from stackjax.optimizers.base import DECAYING, Optimizer, Schedule, find_optimizer
from stackjax.optimizers.muon import Muon

__all__ = [
    "DECAYING",
    "MAX_BFLOAT16_DECAY",
    "AdamW",
    "Muon",
    "Optimizer",
    "Schedule",
    "find_optimizer",
]
