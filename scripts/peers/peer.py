"""Model, batch and interface shared by all peers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

LEARNING_RATE = 1e-3
"""Constant, for all peers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaMA-style decoder with untied head, and a batch."""

    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    vocab_size: int
    seq_len: int
    batch_size: int

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.embed_dim // self.num_heads

    def tokens(self) -> np.ndarray:
        """Returns the batch for every step: random tokens, int32 [B, T + 1].

        The batch is fixed, so every correct step lowers the loss.
        """
        shape = (self.batch_size, self.seq_len + 1)
        return np.random.default_rng(0).integers(0, self.vocab_size, shape, np.int32)


SHAPES = {
    "tiny": Shape(
        num_layers=4,
        embed_dim=256,
        num_heads=4,
        mlp_dim=704,
        vocab_size=512,
        seq_len=256,
        batch_size=8,
    ),
    "small": Shape(
        num_layers=6,
        embed_dim=512,
        num_heads=8,
        mlp_dim=1408,
        vocab_size=32_000,
        seq_len=512,
        batch_size=4,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A train step with initial state and batch."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    """(state, batch) -> (state, loss); need not wait for either."""
    state: Any
    batch: Any
    wait: Callable[[Any], Any]
    """Returns once a state is computed."""
    num_params: int
