"""Loss on held-out sequences, and what layers do there."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stackjax.config import Config, EvaluationConfig
from stackjax.data.batch import Batch
from stackjax.data.device import local_rows, put
from stackjax.data.loader import eval_batches, open_source
from stackjax.data.sources import TokenSource
from stackjax.growth import Growth
from stackjax.model import LossSums, ModelConfig, Params
from stackjax.model.module import compute_dtype
from stackjax.run.layer_statistics import layer_sources, layer_statistics
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand
from stackjax.training.phase import Phase
from stackjax.training.train_state import TrainState, eval_step

# One program serves the seam into a phase and the phase itself, unless it ends early.
_layer_statistics = jax.jit(layer_statistics, static_argnums=(0, 1))


def open_data(config: Config) -> tuple[TokenSource, TokenSource]:
    """Returns the sequences to train on, and the held-out ones."""
    source = open_source(config.data, "train", config.model.vocab_size)
    held_out = open_source(config.data, "validation", config.model.vocab_size)
    check_held_out(config.evaluation, held_out)
    return source, held_out


def check_held_out(config: EvaluationConfig, source: TokenSource) -> None:
    """Raises UserError if there are fewer held-out sequences than an evaluation reads."""
    if config.num_sequences > len(source):
        raise UserError(
            f"evaluation.num_sequences is {config.num_sequences}, but the split "
            f"{source.split!r} of {source.path!r} has {len(source)} sequences of "
            f"{source.seq_len} tokens; give --evaluation.num-sequences {len(source)}."
        )


def check_promise(growth: Growth, model: ModelConfig, before: float, after: float) -> None:
    """Raises UserError where growth moved a held-out loss that it promised to keep."""
    exact_enough = 1e-4 if compute_dtype(model) == jnp.float32 else 2e-2
    if growth.promise == "no":
        return
    if not abs(after - before) <= exact_enough:
        raise UserError(
            f"{growth} promises to keep the function ({growth.promise}), but the held-out "
            f"loss went from {before} to {after}; nothing was committed."
        )


def held_out_loss(
    config: Config, phase: Phase, source: TokenSource, mesh: Mesh
) -> Callable[[TrainState], float]:
    """Returns a function from states of a phase to the `model_loss` of what they run."""

    def step(state: TrainState, batch: Batch) -> tuple[LossSums, jax.Array]:
        return eval_step(phase.model, phase.model_params(state.params, state.step), batch)

    return _mean_loss(config, step, source, mesh)


def held_out_layers(
    config: Config, phase: Phase, source: TokenSource, mesh: Mesh
) -> Callable[[TrainState], dict[str, list[float]]]:
    """Returns a function from states of a phase to the `layer_statistics` of what they run.

    They are those of the first held-out batch, and none where `evaluation.layers` is off.
    """
    copied_from = layer_sources(expand(config)[: phase.index + 1])

    def measure(state: TrainState) -> dict[str, list[float]]:
        if not config.evaluation.layers:
            return {}
        batch = next(_batches(config, source, mesh))
        found = _layer_statistics(phase, copied_from, state.params, state.step, batch)
        return {name: np.asarray(values_L).tolist() for name, values_L in found.items()}

    return measure


def model_loss(
    config: Config, model: ModelConfig, source: TokenSource, mesh: Mesh
) -> Callable[[Params], float]:
    """Returns a function from parameters of a model to their mean loss per token, in nats.

    It always reads the same sequences, and weighs every token alike.

    Args:
      config: Says what is read, and how.
    """
    return _mean_loss(config, functools.partial(eval_step, model), source, mesh)


def _mean_loss(
    config: Config,
    step: Callable[[Any, Batch], tuple[LossSums, jax.Array]],
    source: TokenSource,
    mesh: Mesh,
) -> Callable[[Any], float]:
    compiled = jax.jit(step)

    def loss(tree: Any) -> float:
        # All batches are under way before the first result is waited for.
        results = [compiled(tree, batch) for batch in _batches(config, source, mesh)]
        nll = sum(float(sums.nll) for sums, _ in results)
        return nll / sum(float(weight) for _, weight in results)

    return loss


def _batches(config: Config, source: TokenSource, mesh: Mesh) -> Iterator[Batch]:
    """Returns the batches of an evaluation, on the devices."""
    num_rows = config.evaluation.batch_size
    batches = eval_batches(
        source,
        config.data,
        num_sequences=config.evaluation.num_sequences,
        batch_size=num_rows,
        rows=local_rows(mesh, num_rows),
    )
    return put(batches, mesh, num_rows)
