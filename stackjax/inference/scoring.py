"""How likely a model finds texts: sums of log-likelihoods, many texts at a time.

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
import rich.progress

from stackjax.data.batch import Array
from stackjax.data.device import put_rows
from stackjax.inference.pretrained import Pretrained
from stackjax.model import ModelConfig, Params
from stackjax.model.transformer import head_weight, hidden, logits
from stackjax.runtime.errors import UserError
from stackjax.sharding.partition import logical, num_shards

NUM_LENGTHS = 8
"""Lengths that rows are padded to, each a program to compile."""
_RATIO = 1.6
_AHEAD = 8
"""Batches that are sent before the results of the first are waited for."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Some tokens of a text that are to be scored, each after all that precede it."""

    tokens: Sequence[int]
    """The text; tokens from `stop` on are not read."""
    start: int
    """The first token to be scored; at least 1, as the model needs one to begin with."""
    stop: int
    """The token after the last to be scored; at least `start`."""

    def __post_init__(self):
        if not 1 <= self.start <= self.stop <= len(self.tokens):
            raise UserError(
                f"the span from {self.start} to {self.stop} of {len(self.tokens)} tokens is "
                f"none: start must be at least 1, stop at least start and at most the number "
                f"of tokens; put a prefix before a text that is scored from its first token."
            )


class Score(NamedTuple):
    """How likely a model finds the tokens of a span."""

    log_likelihood: float
    """Sum over the tokens, in nats; 0 if there are none."""
    is_greedy: bool
    """Whether the model finds no token likelier than any of them; so if there are none."""


def score(
    pretrained: Pretrained,
    spans: Sequence[Span],
    batch_size: int = 32,
    console: rich.console.Console | None = None,
) -> list[Score]:
    """Returns how likely the model finds each span, in their order and on every process.

    Args:
      batch_size: Rows that are scored together, rounded up to divide over the mesh.
      console: The terminal that shows a bar, if any does.
    """
    scores: list[Score] = [Score(0.0, True)] * len(spans)
    with jax.set_mesh(pretrained.mesh), _progress(console) as bar:
        task = bar.add_task("scoring", total=sum(span.stop for span in spans))
        for indices, results in _score_batches(pretrained, spans, batch_size):
            sums, are_greedy = map(np.asarray, results)
            # Rows after those of the spans are empty.
            for row, index in enumerate(indices):
                scores[index] = Score(float(sums[row]), bool(are_greedy[row]))
            bar.advance(task, sum(spans[index].stop for index in indices))
    return scores


def _progress(console: rich.console.Console | None) -> rich.progress.Progress:
    is_shown = console is not None and console.is_terminal and jax.process_index() == 0
    return rich.progress.Progress(console=console, disable=not is_shown)


def _score_batches(
    pretrained: Pretrained, spans: Sequence[Span], batch_size: int
) -> Iterator[tuple[Sequence[int], tuple[jax.Array, jax.Array]]]:
    """Yields the indices of the spans of a batch and their results, for every batch."""
    shards = num_shards("batch")
    num_rows = -(-batch_size // shards) * shards
    # The longest first: what does not fit the memory fails at once.
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
        if len(sent) > _AHEAD:
            yield sent.popleft()
    yield from sent


def padded_lengths(longest: int) -> list[int]:
    """Returns the lengths that rows of up to `longest` tokens are padded to, descending."""
    lengths = {
        # Splash attention takes multiples of 128, and short rows need no such kernel.
        -(-length // multiple) * multiple
        for length in (longest / _RATIO**k for k in range(NUM_LENGTHS))
        for multiple in (128 if length > 128 else 32,)
    }
    return sorted(map(int, lengths), reverse=True)


class Rows(NamedTuple):
    """What a batch scores, [B, T] each."""

    tokens: Array
    positions: Array
    labels: Array
    """The token after each."""
    is_scored: Array
    """Whether that token counts."""


def _pad(spans: Sequence[Span], num_rows: int, length: int) -> Rows:
    """Returns spans as rows of one length, and empty rows after them."""
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
    """Returns the sums of log-likelihoods and whether all are greedy, [B], on every device."""
    x_BTD = hidden(config, params, rows.tokens, rows.positions, None)
    w = head_weight(config, params)
    num_rows, length = rows.tokens.shape
    sum_B, is_greedy_B = jnp.zeros(num_rows), jnp.ones(num_rows, bool)
    for start in range(0, length, config.loss_chunk):
        # Logits of all positions at once would be most of the memory.
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
    """Returns the log-likelihood of every label, and whether it is the likeliest."""
    token_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
    labels_BT1 = labels_BT[:, :, None]
    # A gather of the label's logit would fail where the vocabulary is sharded.
    label_BT = jnp.sum(jnp.where(token_V == labels_BT1, logits_BTV, 0.0), axis=-1)
    likely_BT = label_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    # Of equals the first is taken, as by argmax, which takes longer than all else here.
    label_BT1 = label_BT[:, :, None]
    is_before_BTV = (token_V < labels_BT1) & (logits_BTV == label_BT1)
    return likely_BT, ~jnp.any(is_before_BTV | (logits_BTV > label_BT1), axis=-1)
