"""The run, read top to bottom: resume; then for each phase step, evaluate, save; grow.

`python -m stackjax.train --config configs/tiny.py`; the same command again resumes.
"""

import contextlib
import dataclasses
import functools
import shlex
import sys
import warnings
from typing import NoReturn

import jax
from absl import logging
from etils import epath

from stackjax import distributed
from stackjax.checkpoint import (
    Checkpoints,
    absolute,
    clear,
    newest_lineage,
    newest_step,
)
from stackjax.compilation import (
    abstract_state,
    compile_ahead,
    growth_key,
    new_state,
    phase_optimizer,
    use_compilation_cache,
)
from stackjax.config import Config
from stackjax.config_file import (
    changed_fields,
    check_same_data,
    flatten,
    load_config,
    record_config,
)
from stackjax.cpu import keep_memory, release_memory
from stackjax.errors import UserError, one_line_errors
from stackjax.flops import num_params, peak_flops
from stackjax.held_out import check_promise, held_out_layers, held_out_loss, open_data
from stackjax.marker import read_marker, write_marker
from stackjax.metrics import check_sinks, open_sinks, read_rows
from stackjax.observer import Observer
from stackjax.origin import keep_tokenizer
from stackjax.phase import Counts, Phase
from stackjax.phases import expand
from stackjax.preflight import check, check_backend, device_memory
from stackjax.probe import check_probes
from stackjax.progress import open_progress
from stackjax.run import LateRows, Run
from stackjax.sharding import build_mesh, move
from stackjax.start import check_start, start_from
from stackjax.stop import EXIT_CODE, should_stop, stop_on_signals
from stackjax.summary import describe, summarize
from stackjax.task_scores import open_tasks
from stackjax.train_state import TrainState, enter_phase


def train(config: Config) -> None:
    """Runs every phase of a run, from where its directory says that it is.

    Raises:
      UserError: The config, the data or the run directory do not fit together.
      OSError: A file could not be read or written.
      FloatingPointError: The loss is not finite.
      SystemExit: The run was asked to stop, and has been saved.
    """
    workdir = absolute(config.workdir)
    marker = read_marker(workdir)
    is_new = marker.phase == 0 and newest_step(workdir, expand(config)[0]) is None
    # What a run has left that saved nothing binds no other.
    current, ended = marker.phase, {} if is_new else dict(marker.ended)
    phases = expand(config, ended)
    changed = [] if is_new else changed_fields(workdir, config, phases[current].stage)
    if newest_step(workdir, phases[-1]) == phases[-1].num_steps:
        if jax.process_index() == 0:
            print(summarize(workdir, phases, read_rows(workdir)))
            print("This run is finished; start a new one with --workdir DIR.")
        return
    check_backend(config)
    estimates = check(config, jax.device_count(), device_memory(), ended)
    check_probes(config, estimates, device_memory())
    outputs = {
        "tensorboard": config.logging.tensorboard,
        "wandb_project": config.logging.wandb_project,
    }
    check_sinks(workdir, **outputs)
    source, held_out = open_data(config)
    if not is_new:
        check_same_data(workdir, source.manifest)
    elif config.init_from is not None:
        check_start(config.init_from, phases[0].model, config.data.path)
    tasks = open_tasks(config)
    workdir.mkdir(parents=True, exist_ok=True)
    record_config(workdir, config, source.manifest)
    keep_tokenizer(config.data.path, workdir)
    if is_new:
        write_marker(workdir, phases[0], ended)
    use_compilation_cache(workdir)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        state, counts = resume(config, workdir, phases[current])
        resume_at = None if counts == Counts() else (current, counts.tokens)
        run = Run(
            config=config,
            workdir=workdir,
            source=source,
            held_out=held_out,
            sinks=open_sinks(workdir, resume_at, settings=flatten(config), **outputs),
            progress=open_progress(phases[-1].end.tokens),
            stop=stop,
            step_of=compile_ahead(config),
            ended=ended,
            tasks=tasks,
        )
        for output in (*run.sinks, run.progress):
            stack.enter_context(contextlib.closing(output))
        for line in changed:
            run.progress.note(f"changed since this run was last started: {line}")
        device = jax.devices()[0]
        if peak_flops(device) is None:
            run.progress.note(f"no peak FLOP/s is known of {device.device_kind!r}, so no MFU")
        for index in range(current, len(phases)):
            if index > current:
                state = enter(run, run.phases[index - 1], run.phases[index], state)
            state, counts = run_phase(run, run.phases[index], state, counts)
    if jax.process_index() == 0:
        print(summarize(workdir, run.phases, read_rows(workdir)))


def resume(config: Config, workdir: epath.Path, phase: Phase) -> tuple[TrainState, Counts]:
    """Returns the newest state of the phase that the run is in, or that of a new model."""
    mesh = build_mesh(phase.mesh)
    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir, phase, config.checkpoints) as checkpoints,
    ):
        if checkpoints.latest_step is not None:
            return checkpoints.restore(abstract_state(config, phase), mesh)
        if phase.index > 0:
            raise UserError(
                f"{checkpoints.directory} has no checkpoint, but the run is in stage "
                f"{phase.stage}; bring it back, or start a new run with --workdir."
            )
        if config.init_from is None:
            return new_state(config, phase), phase.start
    return start_from(config.init_from, config, workdir, phase, mesh), phase.start


def run_phase(
    run: Run, phase: Phase, state: TrainState, counts: Counts
) -> tuple[TrainState, Counts]:
    """Returns state and counts at the end of a phase, everything logged and saved."""
    config, step, mesh = run.config, int(state.step), build_mesh(phase.mesh)
    if step == phase.num_steps:
        return state, counts
    phases, logs_every = run.phases, config.logging.every_tokens
    steps_before = sum(earlier.num_steps for earlier in phases[: phase.index])
    following = next(iter(phases[phase.index + 1 :]), None)
    with (
        jax.set_mesh(mesh),
        Checkpoints(run.workdir, phase, config.checkpoints) as checkpoints,
    ):
        run.progress.note(
            f"stage {phase.stage}, {phase.name}: {describe(phase.model)}, "
            f"{num_params(phase.model) / 1e6:.3g}M parameters, {phase.num_steps - step} steps"
        )
        train_step = run.step_of(phase, following)
        observer = Observer(run, phase, mesh, counts)
        rows = LateRows(run, phase, checkpoints, counts)
        for batch in run.batches(phase, mesh, counts, phase.num_steps - step):
            if should_stop(run.stop, steps_before + step):
                _save_and_exit(run, checkpoints, rows, step, state, counts)
            state, metrics = train_step(state, batch)
            step, before, counts = step + 1, counts, counts.after(phase.per_step)
            # A stage that ends early, and is known to when it is run again, logs alike.
            is_whole = step == phase.num_steps and phase.stage not in run.ended
            rows.catch_up()
            rows.add(step, counts, metrics, is_whole or counts.passes(logs_every, before))
            reason = observer.look(step, before, counts, state, rows)
            if reason is not None and phase.stage not in run.ended and not is_whole:
                phase = run.end_stage(phase, step, reason)
            is_last = step == phase.num_steps
            if is_last and phase.stage in run.ended:
                rows.write_newest()
                run.write_ending(phase, step, counts)
            if is_last or counts.passes(config.checkpoints.every_tokens, before):
                # Rows are on disk before the checkpoint that makes them final.
                rows.settle()
                checkpoints.save(step, state, counts)
            if is_last:
                break
    return state, counts


def enter(run: Run, source: Phase, target: Phase, state: TrainState) -> TrainState:
    """Returns the state that the target phase starts from, committed to disk.

    Until the marker is written the run is in the source phase, whose last checkpoint is
    whole: a run that is killed before that grows again, to the same bits.
    """
    config, tx = run.config, phase_optimizer(run.config, target)
    source_mesh, target_mesh = build_mesh(source.mesh), build_mesh(target.mesh)
    with jax.set_mesh(source_mesh):
        before = held_out_loss(config, source, run.held_out, source_mesh)(state)
        old_layers = held_out_layers(config, source, run.held_out, source_mesh)(state)
    release_memory()  # of the smaller model's steps
    if target.optimizer_state == "reset":
        jax.tree.map(lambda moment: moment.delete(), state.opt_state)
        state = dataclasses.replace(state, opt_state=None)
    with jax.set_mesh(target_mesh):
        on_target = move(state, target_mesh)
        enter_fn = functools.partial(enter_phase, source, target, tx)
        with warnings.catch_warnings():
            # Only equal shapes are reused in place.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            entered = jax.jit(enter_fn, donate_argnums=0)(on_target, growth_key(config, target))
        # Not sooner: where it is not moved, both are the same buffers.
        jax.tree.map(lambda leaf: leaf.delete(), (state, on_target))
        after = held_out_loss(config, target, run.held_out, target_mesh)(entered)
        new_layers = held_out_layers(config, target, run.held_out, target_mesh)(entered)
        if target.growth is not None:
            check_promise(target.growth, target.model, before, after)
        losses = {"held_out_loss_before": before, "held_out_loss": after}
        run.write("growth", target, 0, target.start, **losses)
        run.write_layers(target, 0, target.start, new_layers, old_layers)
        run.flush()
        clear(run.workdir, target)
        lineage = newest_lineage(run.workdir, source)
        with Checkpoints(run.workdir, target, config.checkpoints, lineage) as checkpoints:
            checkpoints.save(0, entered, target.start)
        write_marker(run.workdir, target, run.ended)
    run.progress.note(
        f"{target.start.tokens:,} tokens: {target.growth or 'same model'}: held-out loss "
        f"{before:.4f} -> {after:.4f}"
    )
    if target.stays_symmetric:
        run.progress.note(
            f"the copies that {target.growth} makes are equal and have equal gradients, so "
            f"they stay equal, as if the model were no larger; split=uneven or noise parts them"
        )
    return entered


def _save_and_exit(
    run: Run,
    checkpoints: Checkpoints,
    rows: LateRows,
    step: int,
    state: TrainState,
    counts: Counts,
) -> NoReturn:
    rows.settle()
    checkpoints.save(step, state, counts)
    checkpoints.wait()
    command = shlex.join(["python", "-m", "stackjax.train", *sys.argv[1:]])
    run.progress.note(f"stopped and saved at {counts.tokens:,} tokens; resume with: {command}")
    sys.exit(EXIT_CODE)


def main() -> None:
    """Runs the command line."""
    # Orbax and Grain log, with tracebacks, the errors that they raise as well.
    logging.set_verbosity(logging.FATAL)
    with one_line_errors(), distributed.errors_once():
        config = load_config("python -m stackjax.train", sys.argv[1:])
        distributed.initialize()
        keep_memory()
        train(config)


if __name__ == "__main__":
    main()
