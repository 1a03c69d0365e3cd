"""Which keys a query attends to besides documents, and the attention logits' cap."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def capped(logits: jax.Array, cap: float | None) -> jax.Array:
    """Returns c tanh(logits / c) for a cap c; the logits themselves for None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@dataclasses.dataclass(frozen=True)
class Masking:
    """Options for causal attention."""

    window: int | None = None
    """Keys for each query, with its own; None for all keys up to the query."""
    cap: float | None = None
    """Bound for the logits: c tanh(logits / c); None for no bound."""

    def within(self, seq_len: int) -> "Masking":
        """Returns the same options without a window that covers all keys."""
        covers = self.window is not None and self.window >= seq_len
        return Masking(None, self.cap) if covers else self

    def is_seen(self, query: T, key: T) -> T:
        """Returns whether queries attend to keys, by broadcastable integer positions."""
        seen = key <= query  # type: ignore
        return seen if self.window is None else seen & (key > query - self.window)  # type: ignore

    def first_key(self, query: int, multiple: int = 1) -> int:
        """Returns the first key that a query attends to, rounded down to a multiple."""
        first = 0 if self.window is None else max(0, query - self.window + 1)
        return first // multiple * multiple


ANY_PAST = Masking()
"""Attention to all keys up to the query, without a cap."""
