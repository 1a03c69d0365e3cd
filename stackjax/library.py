"""The library: the parts of a run as functions, for notebooks and scripts.

Every function enters the mesh of its phase. Only `train_run` writes a run directory.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import optax

from stackjax import config_file
from stackjax.analysis import comparison
from stackjax.analysis.comparison import Comparison
from stackjax.analysis.reading import read_record
from stackjax.config import Config
from stackjax.data.batch import Batch
from stackjax.data.open import open_sources, open_train
from stackjax.inference.generation import continuations, new_text
from stackjax.inference.pretrained import Pretrained
from stackjax.inference.scoring import Score, Span, score
from stackjax.options import LossName, Sampling
from stackjax.run import validation
from stackjax.run.hooks import Hook
from stackjax.run.train import train
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import move
from stackjax.training import train_state
from stackjax.training.batches import longest, phase_batches
from stackjax.training.compile import (
    growth_key,
    jit_growth,
    jit_step,
    new_state,
    step_inputs,
)
from stackjax.training.expand import expand
from stackjax.training.phase import Phase
from stackjax.training.train_state import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
"""A train step: (state, batch) -> (next state, metrics)."""


def load_config(path: str | Path, *overrides: str) -> Config:
    """Returns the config of a Python file with `get_config()`.

    Args:
      overrides: Options as on the command line: `"--stages.0.tokens", "2e6"`.

    Raises:
      UserError: The file is missing or fails, or an option is wrong.
    """
    return config_file.load_config("stackjax train", ["--config", str(path), *overrides])


def train_run(config: Config, hooks: Sequence[Hook] = ()) -> None:
    """Trains all phases in the run directory `config.workdir`, or resumes the run there.

    Args:
      hooks: Functions to call at chosen steps.

    Raises:
      UserError: The config, the data and the run directory do not fit together.
      OSError: A file could not be read or written.
      FloatingPointError: The loss is not finite.
    """
    train(config, hooks=hooks)


def init_state(
    config: Config, phase: Phase, tx: optax.GradientTransformation | None = None
) -> TrainState:
    """Returns the state of a new model, sharded over the mesh of the phase.

    Args:
      tx: An optax optimizer, instead of the config's.
    """
    with jax.set_mesh(build_mesh(phase.mesh)):
        if tx is None:
            return new_state(config, phase)
        init = functools.partial(train_state.init_state, phase.model, _negated(tx))
        return jax.jit(init)(jax.random.key(config.seed))


def make_step(
    config: Config, phase: Phase, tx: optax.GradientTransformation | None = None
) -> Step:
    """Returns the train step of a phase, compiled at the first call.

    The metrics are `loss` (nats per token), `grad_norm`, `learning_rate` and `is_finite`. The
    step donates the state: use the returned state alone.

    Args:
      tx: An optax optimizer with a learning rate, instead of the config's optimizer and
        learning-rate schedule. The metric `learning_rate` is then 1.
    """
    if tx is not None:
        tx, phase = _negated(tx), _at_rate_1(phase)
    jitted, inputs, mesh = (
        jit_step(phase, tx),
        step_inputs(phase),
        build_mesh(phase.mesh),
    )

    def call(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.set_mesh(mesh):
            return jitted(inputs, state, batch)

    return call


def _negated(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer for the train step, which subtracts updates; optax adds updates."""
    return optax.with_extra_args_support(optax.chain(tx, optax.scale(-1.0)))


def _at_rate_1(phase: Phase) -> Phase:
    """Returns a phase with learning rate 1 at every step."""
    rate = phase.learning_rate
    rate = dataclasses.replace(rate, shape="constant", peak=1.0, warmup_tokens=0.0)
    return dataclasses.replace(phase, learning_rate=rate)


def batches(
    config: Config, phase: Phase, *, start: int = 0, steps: int | None = None
) -> Iterator[Batch]:
    """Yields the batches of a phase, on the devices, in the order of a run.

    Args:
      start: First step, counted from the start of the phase.
      steps: Number of batches; by default all up to the end of the phase.

    Raises:
      UserError: The token shards are missing or damaged.
    """
    mesh, first_example = build_mesh(phase.mesh), phase.counts(start).examples
    num_steps = phase.num_steps - start if steps is None else steps
    with jax.set_mesh(mesh):
        phases = expand(config)
        sources = open_train(config.data, config.model.vocab_size, longest(phases))
        sent = phase_batches(sources, config, phases, phase, mesh, first_example, num_steps)
        first = list(itertools.islice(sent, 1))
    yield from first
    yield from sent


def validation_loss(config: Config, phase: Phase, state: TrainState) -> float:
    """Returns the validation loss of a state, in nats per token.

    The sequences are the `evaluation.num_sequences` of the config, the same at every call.
    """
    mesh = build_mesh(phase.mesh)
    vocab_size = config.model.vocab_size
    sources = open_sources(config.data, "validation", vocab_size, phase.seq_len)
    for source in sources:
        validation.check_num_sequences(config.evaluation, source)
    with jax.set_mesh(mesh):
        params = validation.model_params(phase, state)
        return validation.validation_loss(config, phase.model, sources, mesh, params)


def grow_state(
    config: Config,
    source: Phase,
    target: Phase,
    state: TrainState,
    tx: optax.GradientTransformation | None = None,
) -> TrainState:
    """Returns the first state of the phase after `source`, on its own mesh.

    The model grows by the `growth` of the target phase. The source state stays usable.

    Args:
      tx: An optax optimizer for the target, instead of the config's.
    """
    mesh = build_mesh(target.mesh)
    tx = None if tx is None else _negated(tx)
    if target.optimizer_state == "reset":
        state = dataclasses.replace(state, opt_state=None)
    with jax.set_mesh(mesh):
        return jit_growth(source, target, tx)(move(state, mesh), growth_key(config, target))


def generate_text(
    model: Pretrained,
    prompts: Sequence[str],
    *,
    max_tokens: int = 100,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[str]:
    """Returns the text generated after each prompt.

    Args:
      max_tokens: Maximum number of new tokens per prompt.
      sampling: Temperature, top-k and top-p; by default temperature 1.

    Raises:
      UserError: There are no prompts, or `max_tokens` is below 1.
    """
    encoded = [model.tokenization.encode_prompt(prompt) for prompt in prompts]
    key, drawn = jax.random.key(seed), sampling or Sampling()
    found = continuations(model, encoded, drawn, max_tokens, key)
    return [
        "".join(new_text(model.tokenization, prompt.tolist(), tokens.tolist()))
        for prompt, tokens in zip(encoded, found, strict=True)
    ]


def score_texts(
    model: Pretrained, texts: Sequence[str], *, batch_size: int = 32
) -> list[Score]:
    """Returns the log-likelihood of each text, in nats, from its first token on.

    Args:
      batch_size: Texts per batch.
    """
    return score(model, [_span(model, text) for text in texts], batch_size)


def _span(model: Pretrained, text: str) -> Span:
    """Returns all tokens of a text, after the prefix token as context."""
    prefix_id = model.tokenization.prefix_id
    tokens = model.tokenization.encode_prompt(text).tolist()
    if tokens[:1] != [prefix_id]:
        tokens = [prefix_id, *tokens]
    return Span(tokens, 1, len(tokens))


def compare_runs(
    paths: Sequence[str | Path], *, loss: LossName = "held_out"
) -> list[Comparison]:
    """Returns the comparison of each group of grown runs with the runs from scratch.

    Runs with different seeds and otherwise equal settings form a group.

    Args:
      paths: Run directories.
      loss: Validation loss, or training loss.

    Raises:
      UserError: A run cannot be read, or the runs do not compare.
    """
    records = [read_record(Path(path)) for path in paths]
    return comparison.compare(comparison.group(records), loss)
