"""The input to a train step."""

from typing import Any, NamedTuple

Array = Any
"""The process's own rows as numpy array; after `device.put`, a global jax.Array."""


class Batch(NamedTuple):
    """Token sequences; every field is [accumulate, B, T].

    Microbatches have a separate leading axis, so gradient accumulation never reshapes a sharded
    axis.
    """

    tokens: Array
    """int32: the input tokens. Position t predicts the token at t + 1."""
    positions: Array
    """int32: the position of each token in the document or sequence."""
    segments: Array | None
    """int32: tokens attend only within a segment; None if each row is a single segment."""
    loss_weights: Array
    """float32: the weight of each prediction; 0 means no loss."""
