"""Cost of scoring and generating texts."""

import dataclasses
import functools
import time

import jax
import numpy as np
from jax.sharding import Mesh

from scripts.measure.machine import check_memory
from scripts.measure.result import median, seconds_of
from stackjax import model
from stackjax.config import Config
from stackjax.data.device import put_rows
from stackjax.inference.generation import generate
from stackjax.inference.pretrained import Pretrained
from stackjax.inference.scoring import Span, score
from stackjax.options import Sampling
from stackjax.tokenizer.tokenization import tokenization
from stackjax.tokenizer.tokenizer import load_tokenizer
from stackjax.training.phase import Phase

REPEATS = 7
BATCHES = 4
DRAWS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """Texts as long as the run's sequences, as many at a time as an evaluation reads."""

    forward_seconds: float
    """Median forward pass to a batch's logits."""
    scored_seconds: float
    """Median time to score the batch, from tokens on the host to sums on the host."""
    forward_passes: float
    """`scored_seconds` over `forward_seconds`."""
    scored_tokens_per_second: float
    decode_seconds: float
    """Median time per token for all rows, after prompts of half a sequence."""
    decoded_tokens_per_second: float
    """Over all rows."""


def measure_inference(config: Config, phase: Phase, mesh: Mesh) -> Inference:
    """Returns a phase's inference cost, on the current mesh."""
    num_rows, seq_len = config.evaluation.batch_size, phase.seq_len
    logits_bytes = 4 * num_rows * seq_len * phase.model.padded_vocab_size // mesh.size
    check_memory("the logits of an evaluation", logits_bytes)
    init = functools.partial(model.init, phase.model)
    pretrained = Pretrained(
        config=phase.model,
        params=jax.jit(init)(jax.random.key(0)),
        mesh=mesh,
        tokenization=tokenization(load_tokenizer("bytes")),
        seq_len=seq_len,
    )
    shape = (BATCHES * num_rows, seq_len + 1)
    tokens = np.random.default_rng(0).integers(1, phase.model.vocab_size, shape, np.int32)
    forward, scored = _forward_and_scored(pretrained, tokens, num_rows)
    decode = _decode_seconds(pretrained, tokens[:num_rows, : max(1, seq_len // 2)])
    return Inference(
        forward_seconds=forward,
        scored_seconds=scored,
        forward_passes=scored / forward,
        scored_tokens_per_second=num_rows * seq_len / scored,
        decode_seconds=decode,
        decoded_tokens_per_second=num_rows / decode,
    )


def _forward_and_scored(
    pretrained: Pretrained, tokens: np.ndarray, num_rows: int
) -> tuple[float, float]:
    """Returns seconds per batch for both, measured in turns."""
    spans = [Span(row, 1, len(row)) for row in tokens.tolist()]
    batches = [
        tokens[first : first + num_rows, :-1] for first in range(0, len(tokens), num_rows)
    ]
    forward, scored = [], []
    for repeat in range(1 + REPEATS):
        seconds, _ = seconds_of(lambda: [_forward(pretrained, batch) for batch in batches])
        start = time.perf_counter()
        score(pretrained, spans, num_rows)
        # The first repeat compiles.
        if repeat > 0:
            forward.append(seconds / len(batches))
            scored.append((time.perf_counter() - start) / len(batches))
    return median(forward), median(scored)


def _forward(pretrained: Pretrained, tokens_BT: np.ndarray) -> jax.Array:
    shape = tokens_BT.shape
    positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return _apply(
        pretrained.config, pretrained.params, put_rows(tokens_BT), put_rows(positions_BT), None
    )


_apply = jax.jit(model.apply, static_argnums=0)


def _decode_seconds(pretrained: Pretrained, prompts_BT: np.ndarray) -> float:
    key, sampling = jax.random.key(0), Sampling(temperature=1)
    times = []
    for _ in generate(pretrained, list(prompts_BT), sampling, DRAWS, key):
        times.append(time.perf_counter())
    return median(list(np.diff(times)))
