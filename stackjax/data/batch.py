"""What a train step reads."""

from typing import Any, NamedTuple

Array = Any
"""A jax.Array on the devices of a mesh; before that the numpy rows of one process."""


class Batch(NamedTuple):
    """Sequences of tokens, each field `[accumulate, B, T]` as the loader yields it.

    Microbatches have their own leading axis, so that accumulation never reshapes a
    sharded one.
    """

    tokens: Array
    """int32: the input tokens. Position t learns to predict the token at t + 1."""
    positions: Array
    """int32: the position of each token in its document or sequence."""
    segments: Array | None
    """int32: tokens attend only within one segment; None if each row is one segment."""
    loss_weights: Array
    """float32: the weight of each prediction; 0 where the next token is not to be learnt."""
