"""The seam between two phases: growth, evaluation before and after, first checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

from stackjax.checkpoint.directory import clear
from stackjax.checkpoint.restore import newest_lineage
from stackjax.checkpoint.save import Checkpoints
from stackjax.config import Config
from stackjax.data.sources import TokenSource
from stackjax.model.config import RopeScaling
from stackjax.run.averaging import averaged
from stackjax.run.goodput import KIND as GOODPUT
from stackjax.run.run import Run
from stackjax.run.sinks import plain_values
from stackjax.run.validation import (
    LOSS,
    beyond_metrics,
    check_preserved,
    layer_metrics,
    model_params,
    validation_metrics,
    with_length,
)
from stackjax.runtime.cpu_memory import release_memory
from stackjax.runtime.errors import memory_used_by
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import move
from stackjax.training.compile import growth_key, jit_growth, partial_donation
from stackjax.training.phase import Phase
from stackjax.training.run_history import after_entering
from stackjax.training.train_state import TrainState, placed

T = TypeVar("T")


def enter(run: Run, source: Phase, target: Phase, state: TrainState) -> TrainState:
    """Returns the target phase's first state, committed to disk and as from `placed`.

    Until the history is written the run is in the source phase, whose last checkpoint is
    complete. A run killed before then grows again, to the same bits.
    """
    if target.part:
        return _change_batch(run, source, target, state)
    # The same sequences before and after, so that the losses compare.
    held_out = with_length(run.validation, source.seq_len)
    before, old_layers = _evaluate(run, source, state, held_out)
    release_memory()  # after the smaller model's steps
    if target.optimizer_state == "reset":
        jax.tree.map(lambda moment: moment.delete(), state.opt_state)
        state = dataclasses.replace(state, opt_state=None)
    metrics = _renamed(before, "before")
    with (
        run.clock.measure("seam"),
        memory_used_by(lambda: f"the growth into stage {target.stage}"),
    ):
        losses = [before[LOSS]]
        if target.average_checkpoints > 1:
            state = averaged(run, source, target, state)
            mean, _ = _evaluate(run, source, state, held_out)
            metrics |= _renamed(mean, "averaged")
            losses.append(mean[LOSS])
        entered = placed(target, _grow(run.config, source, target, state))
        after, layers = _evaluate(run, target, entered, held_out)
        losses.append(after[LOSS])
        # Other rotary positions change the function, whatever the growth does.
        if target.growth is not None and _positions(source) == _positions(target):
            check_preserved(target.growth, target.model, *losses[-2:])
        metrics |= after | _beyond(run, target, entered)
        run.write("growth", target, 0, target.start, **metrics)
        if layers:
            layers |= _renamed(old_layers, "before")
            run.write("layers", target, 0, target.start, **layers)
        run.write(GOODPUT, target, 0, target.start, **run.clock.values())
        _commit(run, source, target, entered)
    run.progress.note(
        f"{target.start.tokens:,} tokens: {_change(target)}: held-out loss "
        f"{' -> '.join(f'{loss:.4f}' for loss in losses)}"
    )
    if target.stays_symmetric:
        run.progress.note(
            f"copies made by {target.growth} are equal and have equal gradients, so they stay "
            f"equal and the model is no larger in effect; split=uneven or noise separates them"
        )
    return entered


def _renamed(metrics: Mapping[str, T], suffix: str) -> dict[str, T]:
    return {f"{name}_{suffix}": value for name, value in metrics.items()}


def _change(target: Phase) -> str:
    """Returns the model's change at the start of a phase."""
    number = target.average_checkpoints
    mean = f"mean of {number} checkpoints, " if number > 1 else ""
    return f"{mean}{target.growth or 'same model'}"


def _positions(phase: Phase) -> tuple[float, RopeScaling | None]:
    """Returns what determines the rotary positions in a phase."""
    return phase.model.rope_theta, phase.model.rope_scaling


def _change_batch(run: Run, source: Phase, target: Phase, state: TrainState) -> TrainState:
    """Returns the state at step 0 of the next part of a stage, committed to disk."""
    with run.clock.measure("seam"):
        state = dataclasses.replace(state, step=jnp.zeros_like(state.step))
        _commit(run, source, target, state)
    run.progress.note(
        f"{target.start.tokens:,} tokens: from {source.batch_size} to {target.batch_size} "
        f"sequences in a batch"
    )
    return state


def _commit(run: Run, source: Phase, target: Phase, entered: TrainState) -> None:
    """Saves a phase's first state, and moves the run's position there."""
    rows = run.flush()
    clear(run.workdir, target)
    lineage = newest_lineage(run.workdir, source)
    with (
        run.clock.measure("checkpoint"),
        jax.set_mesh(build_mesh(target.mesh)),
        Checkpoints(run.workdir, target, run.config.checkpoints, lineage) as checkpoints,
    ):
        checkpoints.save(0, entered, target.start, rows)
    run.commit(after_entering(run.history, source, target))


def _evaluate(
    run: Run, phase: Phase, state: TrainState, held_out: tuple[TokenSource, ...]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns a state's validation metrics and layer statistics."""
    config, mesh = run.config, build_mesh(phase.mesh)
    with run.clock.measure("evaluation"), jax.set_mesh(mesh):
        params = model_params(phase, state)
        metrics = validation_metrics(config, phase.model, held_out, mesh, params)
        phases = run.phases[: phase.index + 1]
        return metrics, plain_values(layer_metrics(config, phases, held_out, mesh, params))


def _beyond(run: Run, target: Phase, state: TrainState) -> dict[str, float]:
    """Returns the validation loss at positions that only the target's sequences have."""
    mesh, phases = build_mesh(target.mesh), run.phases[: target.index + 1]
    held_out = with_length(run.validation, target.seq_len)
    with run.clock.measure("evaluation"), jax.set_mesh(mesh):
        params = model_params(target, state)
        return beyond_metrics(run.config, phases, held_out, mesh, params)


def _grow(config: Config, source: Phase, target: Phase, state: TrainState) -> TrainState:
    """Returns the target phase's first state, on the target's mesh; deletes the source."""
    mesh = build_mesh(target.mesh)
    with jax.set_mesh(mesh), partial_donation():
        moved = move(state, mesh)
        grow = jit_growth(source, target, donate=True)
        entered = grow(moved, growth_key(config, target))
    # `moved` may share buffers with `state`, so both are deleted after growth.
    jax.tree.map(lambda leaf: leaf.delete(), (state, moved))
    return entered
