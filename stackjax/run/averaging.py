"""Growth from the mean parameters of the last checkpoints (LAWA, arXiv:2306.03241)."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from stackjax.checkpoint.directory import saved_steps
from stackjax.checkpoint.regular import num_regular, regular_steps
from stackjax.checkpoint.saved_state import load_state, read_array_types
from stackjax.config import Config
from stackjax.model import Params
from stackjax.run.resume import read_or_go_back
from stackjax.run.run import Run
from stackjax.runtime.agreement import from_process_0
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import build_mesh
from stackjax.training.compile import abstract_state
from stackjax.training.phase import Phase
from stackjax.training.train_state import TrainState


def check_averages(config: Config, phases: Sequence[Phase]) -> None:
    """Raises UserError if a phase ends with too few checkpoints for the growth after it.

    Args:
      phases: The present phase and all later phases.
    """
    for source, target in itertools.pairwise(phases):
        found = num_regular(source, config.checkpoints.every_tokens)
        _check_enough(config, source, target, found)


def averaged(run: Run, source: Phase, target: Phase, state: TrainState) -> TrainState:
    """Returns a phase's last state, with its last checkpoints' mean parameters.

    Trained parameters are averaged, before masks are applied; they and their sum are float32.
    The optimizer state is the last checkpoint's. A resumed run has the same checkpoints on
    disk, and the same mean. Beside the state, one checkpoint's parameters at a time are on the
    devices; the state's own parameters are donated.

    Args:
      target: The next phase, with the number of checkpoints.
      state: The last state, as in the newest checkpoint.

    Raises:
      UserError: There are too few checkpoints, or one is damaged.
    """
    *earlier, _ = from_process_0(lambda: _averaged_steps(run, source, target))
    with jax.set_mesh(build_mesh(source.mesh)):
        total = state.params
        for step in earlier:
            total = _plus(total, _load_params(run, source, step))
        mean = _divided(total, target.average_checkpoints)
    return dataclasses.replace(state, params=mean)


@functools.partial(jax.jit, donate_argnums=0)
def _plus(total: Params, params: Params) -> Params:
    return jax.tree.map(jnp.add, total, params)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _divided(total: Params, number: int) -> Params:
    return jax.tree.map(lambda leaf: leaf / number, total)


def _averaged_steps(run: Run, source: Phase, target: Phase) -> list[int]:
    """Returns the steps to average, in order; UserError if there are too few."""
    directory = run.workdir / source.directory
    every_tokens, saved = run.config.checkpoints.every_tokens, saved_steps(directory)
    found = regular_steps(directory, source, every_tokens, saved)
    _check_enough(run.config, source, target, len(found))
    return found[-target.average_checkpoints :]


def _load_params(run: Run, source: Phase, step: int) -> Params:
    """Returns the parameters in a phase's checkpoint; UserError if it is damaged."""
    phases = run.phases[: source.index + 1]
    of_directory = {run.workdir / each.directory: each for each in phases}

    def load(checkpoint: epath.Path) -> Params:
        mesh = build_mesh(of_directory[checkpoint.parent].mesh)
        with jax.set_mesh(mesh):
            whole = abstract_state(of_directory[checkpoint.parent])
            part = dataclasses.replace(whole, opt_state=None)
            return load_state(checkpoint, read_array_types(checkpoint), part, mesh).params

    return read_or_go_back(run.workdir, phases, step, load)


def _check_enough(config: Config, source: Phase, target: Phase, found: int) -> None:
    number = target.average_checkpoints
    if 1 < number > found:
        raise UserError(
            f"stages.{target.stage}.average_checkpoints is {number}, but {source.directory} "
            f"has {found}, from its end and every {config.checkpoints.every_tokens} tokens; "
            f"average fewer, lower checkpoints.every_tokens, or make stage {source.stage} "
            f"longer."
        )
