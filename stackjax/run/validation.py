"""Metrics on validation sequences."""

import collections
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stackjax.config import Config, EvaluationConfig
from stackjax.data.batch import Batch
from stackjax.data.device import local_rows, put
from stackjax.data.loader import eval_batches
from stackjax.data.open import Source, open_sources, open_train
from stackjax.data.source_metrics import by_source
from stackjax.data.sources import TokenSource
from stackjax.growth import Growth
from stackjax.model import ModelConfig, Params
from stackjax.model.module import compute_dtype
from stackjax.run.layer_statistics import layer_sources, layer_statistics
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Phase
from stackjax.training.stages import stage_seq_lens
from stackjax.training.train_state import TrainState, eval_step

T = TypeVar("T")

LOSS = "held_out_loss"
BEYOND = "held_out_loss_beyond"
_IN_FLIGHT = 8
"""Batches sent to the devices before the first result is read."""
_layer_statistics = jax.jit(layer_statistics, static_argnums=(0, 1))
_model_params = jax.jit(Phase.model_params, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def batch_sums(
    model: ModelConfig, params: Params, batch: Batch
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns sums over the tokens of a batch `[1, B, T]`, and the tokens' total weight.

    The means per token over all batches become fields in evaluation rows. To add a validation
    metric, add a sum here.
    """
    sums, weight = eval_step(model, params, batch)
    return {"held_out_loss": sums.nll}, weight


def validation_metrics(
    config: Config,
    model: ModelConfig,
    sources: Sequence[TokenSource],
    mesh: Mesh,
    params: Params,
    first_position: int = 0,
) -> dict[str, float]:
    """Returns every metric's mean per validation token.

    With several sources, `METRIC/SOURCE` is the mean of a source, and the metric itself is the
    mean over sources, weighted by `data.sources.N.weight`. Every call with the same sources
    reads the same sequences. Losses are in nats.

    Args:
      first_position: Only predictions from this position on count.
    """
    by_name = {
        source.name: _means(
            batch_sums(model, params, batch)
            for batch in validation_batches(config, source, mesh, first_position)
        )
        for source in sources
    }
    weights = np.array([source.weight for source in config.data.all_sources])
    found: dict[str, float] = {}
    for metric in next(iter(by_name.values())):
        values = [means[metric] for means in by_name.values()]
        found[metric] = float(np.average(values, weights=weights))
        if len(values) > 1:
            found |= dict(zip(by_source(metric, list(by_name)), values, strict=True))
    return found


def _means(
    results: Iterable[tuple[dict[str, jax.Array], jax.Array]],
) -> dict[str, float]:
    """Returns each sum over all batches, divided by the tokens' total weight."""
    totals: dict[str, float] = collections.defaultdict(float)
    total_weight = 0.0
    for sums, weight in _in_flight(results):
        total_weight += float(weight)
        for name, value in sums.items():
            totals[name] += float(value)
    return {name: total / total_weight for name, total in totals.items()}


def beyond_metrics(
    config: Config,
    phases: Sequence[Phase],
    sources: Sequence[TokenSource],
    mesh: Mesh,
    params: Params,
) -> dict[str, float]:
    """Returns the validation loss at positions beyond the sequences of earlier phases.

    Args:
      phases: The run's phases up to the present phase. Nothing is returned if an earlier
        stage had sequences of this length.
    """
    present = phases[-1]
    before = [phase.seq_len for phase in phases if phase.stage < present.stage]
    first = max(before, default=present.seq_len)
    if present.seq_len <= first:
        return {}
    # The prediction at the last old position is the first of a token beyond.
    metrics = validation_metrics(config, present.model, sources, mesh, params, first - 1)
    return {
        name.replace(LOSS, BEYOND, 1): value
        for name, value in metrics.items()
        if name.startswith(LOSS)
    }


def validation_loss(
    config: Config,
    model: ModelConfig,
    sources: Sequence[TokenSource],
    mesh: Mesh,
    params: Params,
) -> float:
    """Returns a model's validation loss, in nats per token."""
    return validation_metrics(config, model, sources, mesh, params)[LOSS]


def layer_metrics(
    config: Config,
    phases: Sequence[Phase],
    sources: Sequence[TokenSource],
    mesh: Mesh,
    params: Params,
) -> dict[str, jax.Array]:
    """Returns `layer_statistics` on the first validation batch; nothing if they are off.

    Args:
      phases: The run's phases up to the present phase.
    """
    if not config.evaluation.layers:
        return {}
    batch = next(validation_batches(config, sources[0], mesh))
    return _layer_statistics(phases[-1].model, layer_sources(phases), params, batch)


def model_params(phase: Phase, state: TrainState) -> Params:
    """Returns the model's parameters in a state: with masks and learned maps applied."""
    if not phase.reparameterizations:
        return state.params
    return _model_params(phase, state.params, phase.tokens(state.step))


def open_data(config: Config) -> tuple[tuple[Source, ...], tuple[TokenSource, ...]]:
    """Returns the training sequences and the validation sequences, by source.

    The sequences have the length of the run's longest.
    """
    seq_len, vocab_size = max(stage_seq_lens(config)), config.model.vocab_size
    sources = open_train(config.data, vocab_size, seq_len)
    validation = open_sources(config.data, "validation", vocab_size, seq_len)
    for source in validation:
        check_num_sequences(config.evaluation, source)
    return sources, validation


def with_length(sources: Sequence[TokenSource], seq_len: int) -> tuple[TokenSource, ...]:
    """Returns the sources as sequences of another length."""
    return tuple(source.with_length(seq_len) for source in sources)


def check_num_sequences(config: EvaluationConfig, source: TokenSource) -> None:
    """Raises UserError if there are fewer validation sequences than an evaluation reads."""
    if config.num_sequences > len(source):
        raise UserError(
            f"evaluation.num_sequences is {config.num_sequences}, but the split "
            f"{source.split!r} of {source.path!r} has {len(source)} sequences of "
            f"{source.seq_len} tokens; give --evaluation.num-sequences {len(source)}."
        )


def check_preserved(growth: Growth, model: ModelConfig, before: float, after: float) -> None:
    """Raises UserError if a function-preserving growth changed the validation loss."""
    tolerance = 1e-4 if compute_dtype(model) == jnp.float32 else 2e-2
    if growth.preserves_function != "never" and not abs(after - before) <= tolerance:
        raise UserError(
            f"{growth}.preserves_function is {growth.preserves_function!r}, but the held-out "
            f"loss went from {before} to {after}; nothing was committed. Choose another "
            f"growth, or correct the operator."
        )


def _in_flight(results: Iterable[T]) -> Iterator[T]:
    """Yields results from the devices, with only a few started ahead."""
    started: collections.deque[T] = collections.deque()
    for result in results:
        started.append(result)
        if len(started) > _IN_FLIGHT:
            yield started.popleft()
    yield from started


def validation_batches(
    config: Config, source: TokenSource, mesh: Mesh, first_position: int = 0
) -> Iterator[Batch]:
    """Returns a source's validation batches `[1, B, T]`, on the devices.

    Args:
      first_position: Predictions from earlier positions have loss weight 0.
    """
    num_rows = config.evaluation.batch_size
    batches = eval_batches(
        source,
        config.data,
        num_sequences=config.evaluation.num_sequences,
        batch_size=num_rows,
        rows=local_rows(mesh, num_rows),
        first_position=first_position,
    )
    return put(batches, mesh, num_rows)
