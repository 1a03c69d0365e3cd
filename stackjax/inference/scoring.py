"""Batched log-likelihoods of texts.

Shapes: B rows of a batch, T time, V vocabulary (padded).
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from stackjax.data.batch import Array
from stackjax.data.device import put_rows
from stackjax.inference.pretrained import Pretrained
from stackjax.model import ModelConfig, Params
from stackjax.model.transformer import head_weight, hidden, logits
from stackjax.runtime.errors import UserError
from stackjax.runtime.progress_bar import progress_bar
from stackjax.sharding.partition import logical, num_shards

NUM_LENGTHS = 8
"""Number of padded lengths; each compiles a program."""
_RATIO = 1.6
_IN_FLIGHT = 8
"""Batches in flight before the oldest result is read."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens to score within a text; all earlier tokens are context."""

    tokens: Sequence[int]
    """Tokenized text; tokens from `stop` on are ignored."""
    start: int
    """First scored token; at least 1, because the model needs a context."""
    stop: int
    """End (exclusive); at least `start`."""

    def __post_init__(self):
        if not 1 <= self.start <= self.stop <= len(self.tokens):
            raise UserError(
                f"span from {self.start} to {self.stop} of {len(self.tokens)} tokens: it must "
                f"be 1 <= start <= stop <= tokens; to score a whole text, put a prefix token "
                f"before the text."
            )


class Score(NamedTuple):
    """Log-likelihood of a span under a model."""

    log_likelihood: float
    """Sum over the span's tokens, in nats; 0 for an empty span."""
    is_greedy: bool
    """Whether greedy decoding would produce the span; true for an empty span."""


def score(
    pretrained: Pretrained,
    spans: Sequence[Span],
    batch_size: int = 32,
    console: rich.console.Console | None = None,
) -> list[Score]:
    """Returns a score for each span, in order and on every process.

    Args:
      batch_size: Rows per batch, rounded up to a multiple of the batch shards.
      console: Terminal for the progress bar.
    """
    scores: list[Score] = [Score(0.0, True)] * len(spans)
    total = sum(span.stop for span in spans)
    is_shown = console is not None and jax.process_index() == 0
    bar = progress_bar("scoring", total, is_shown=is_shown, console=console)
    with jax.set_mesh(pretrained.mesh), bar as advance:
        for indices, results in _score_batches(pretrained, spans, batch_size):
            sums, are_greedy = map(np.asarray, results)
            # Further rows are padding.
            for row, index in enumerate(indices):
                scores[index] = Score(float(sums[row]), bool(are_greedy[row]))
            advance(sum(spans[index].stop for index in indices))
    return scores


def _score_batches(
    pretrained: Pretrained, spans: Sequence[Span], batch_size: int
) -> Iterator[tuple[Sequence[int], tuple[jax.Array, jax.Array]]]:
    """Yields span indices and results for every batch."""
    shards = num_shards("batch")
    num_rows = -(-batch_size // shards) * shards
    # Longest first, so that an out-of-memory error comes at once.
    order = sorted(range(len(spans)), key=lambda index: -spans[index].stop)
    lengths = padded_lengths(max([pretrained.seq_len, *(span.stop - 1 for span in spans)]))
    sent = collections.deque()
    for first in range(0, len(order), num_rows):
        indices = order[first : first + num_rows]
        rows = [spans[index] for index in indices]
        longest = max(span.stop - 1 for span in rows)
        length = min(length for length in lengths if length >= longest)
        batch = Rows(*map(put_rows, _pad(rows, num_rows, length)))
        sent.append((indices, score_rows(pretrained.config, pretrained.params, batch)))
        if len(sent) > _IN_FLIGHT:
            yield sent.popleft()
    yield from sent


def padded_lengths(longest: int) -> list[int]:
    """Returns the padded lengths for rows up to `longest` tokens, descending."""
    lengths = {
        # Splash attention needs multiples of 128; short rows do not use the kernel.
        -(-length // multiple) * multiple
        for length in (longest / _RATIO**k for k in range(NUM_LENGTHS))
        for multiple in (128 if length > 128 else 32,)
    }
    return sorted(map(int, lengths), reverse=True)


class Rows(NamedTuple):
    """A batch of spans; all arrays are [B, T]."""

    tokens: Array
    positions: Array
    labels: Array
    """Next token at each position."""
    is_scored: Array
    """Whether the label is part of the span."""


def _pad(spans: Sequence[Span], num_rows: int, length: int) -> Rows:
    """Returns spans padded to a common length, followed by empty rows."""
    shape = (num_rows, length)
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    rows = Rows(
        tokens=np.zeros(shape, np.int32),
        positions=positions_BT,
        labels=np.zeros(shape, np.int32),
        is_scored=np.zeros(shape, bool),
    )
    for row, span in enumerate(spans):
        tokens = np.asarray(span.tokens[: span.stop])
        rows.tokens[row, : span.stop - 1] = tokens[:-1]
        rows.labels[row, : span.stop - 1] = tokens[1:]
        rows.is_scored[row, span.start - 1 : span.stop - 1] = True
    return rows


@functools.partial(jax.jit, static_argnums=0)
def score_rows(config: ModelConfig, params: Params, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Returns summed log-likelihoods and greedy flags, [B], replicated on every device."""
    x_BTD = hidden(config, params, rows.tokens, rows.positions, None)
    w = head_weight(config, params)
    num_rows, length = rows.tokens.shape
    sum_B, is_greedy_B = jnp.zeros(num_rows), jnp.ones(num_rows, bool)
    for start in range(0, length, config.loss_chunk):
        # In chunks: logits of all positions would dominate memory.
        chunk = slice(start, start + config.loss_chunk)
        likely_BT, is_first_BT = _score_labels(
            logits(config, w, x_BTD[:, chunk]), rows.labels[:, chunk]
        )
        is_scored_BT = rows.is_scored[:, chunk]
        sum_B += jnp.sum(jnp.where(is_scored_BT, likely_BT, 0.0), axis=1)
        is_greedy_B &= jnp.all(is_first_BT | ~is_scored_BT, axis=1)
    whole = logical(None)
    if whole is None:
        return sum_B, is_greedy_B
    return jax.sharding.reshard((sum_B, is_greedy_B), whole)


def _score_labels(logits_BTV: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each label's log-likelihood and whether the label is the argmax."""
    token_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
    labels_BT1 = labels_BT[:, :, None]
    # A masked sum, because a gather would fail on a sharded vocabulary.
    label_BT = jnp.sum(jnp.where(token_V == labels_BT1, logits_BTV, 0.0), axis=-1)
    likely_BT = label_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    # The first maximum wins, as in argmax, which would be slower here.
    label_BT1 = label_BT[:, :, None]
    is_before_BTV = (token_V < labels_BT1) & (logits_BTV == label_BT1)
    return likely_BT, ~jnp.any(is_before_BTV | (logits_BTV > label_BT1), axis=-1)
