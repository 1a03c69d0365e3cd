"""The training run: resume; for each phase step, evaluate and save; grow in between."""

import contextlib
import dataclasses
import functools
import shlex
import sys
import warnings
from typing import Any, NoReturn

import jax
from etils import epath

from stackjax.checkpoint.directory import absolute, clear
from stackjax.checkpoint.restore import check_rows_of, newest_lineage
from stackjax.checkpoint.save import Checkpoints
from stackjax.config import Config
from stackjax.config_file import flatten, is_of_training, same_everywhere
from stackjax.files.rows_file import read_rows
from stackjax.files.run_lock import run_lock
from stackjax.inference.provenance import keep_tokenizer
from stackjax.model.flops import describe, num_params, peak_flops
from stackjax.options import ResumeConfig
from stackjax.run.callbacks import Observer
from stackjax.run.compile_ahead import compile_ahead, ends_while_compiling
from stackjax.run.growth_probe import check_probes
from stackjax.run.held_out import check_promise, held_out_layers, held_out_loss, open_data
from stackjax.run.init_from import check_start, state_at
from stackjax.run.metrics import check_sinks, open_sinks
from stackjax.run.progress import open_progress, timed
from stackjax.run.resume import NEWEST, Position, commit_position, find_position
from stackjax.run.run import Run
from stackjax.run.step_log import LateRows
from stackjax.run.summary import how_to_train_longer, summarize
from stackjax.run.task_scores import open_tasks
from stackjax.runtime import distributed
from stackjax.runtime.agreement import check_agreement, from_process_0, program
from stackjax.runtime.command_line import program as program_name
from stackjax.runtime.cpu_memory import keep_memory, release_memory
from stackjax.runtime.errors import memory_used_by, one_line_errors
from stackjax.runtime.preemption import EXIT_CODE, should_stop, stop_on_signals
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import move
from stackjax.training.compile import growth_key, phase_optimizer, use_compilation_cache
from stackjax.training.phase import Counts, Phase
from stackjax.training.preflight import check, check_backend, device_memory
from stackjax.training.run_position import after_entering
from stackjax.training.train_state import TrainState, enter_phase


def train(config: Config, options: ResumeConfig = NEWEST) -> None:
    """Runs every phase of a run, from the position that its directory names.

    Raises:
      UserError: The config, the data, the hosts or the run directory do not fit together.
      OSError: A file could not be read or written.
      FloatingPointError: The loss is not finite.
      SystemExit: The run was told to stop, and has been saved.
    """
    workdir = absolute(config.workdir)
    check_agreement(program() | same_everywhere(config))
    with contextlib.ExitStack() as stack:
        # From here on nobody else changes what is found in the directory.
        stack.enter_context(run_lock(workdir))
        position = from_process_0(lambda: find_position(workdir, config, options))
        if position.is_finished:
            _tell_finished(config, workdir, position)
            return
        _check(config, position)
        source, held_out = open_data(config)
        check_agreement({"the data at data.path": source.manifest.digest})
        if position.step is None and config.init_from is not None:
            check_start(config.init_from, position.phase.model, config.data.path)
        tasks = open_tasks(config)
        stop = stack.enter_context(stop_on_signals())
        from_process_0(lambda: commit_position(workdir, config, position, source.manifest))
        keep_tokenizer(config.data.path, workdir)
        use_compilation_cache(workdir)
        state, counts, rows = state_at(config, workdir, position)
        resume_at = None if counts == Counts() else (position.phase.index, counts.tokens)
        run = Run(
            config=config,
            workdir=workdir,
            source=source,
            held_out=held_out,
            sinks=open_sinks(
                workdir, resume_at, rows=rows, settings=flatten(config), **_outputs(config)
            ),
            progress=open_progress(position.phases[-1].end.tokens),
            stop=stop,
            step_of=compile_ahead(config, stop),
            marker=position.marker,
            phases=position.phases,
            tasks=tasks,
        )
        for output in (*run.sinks, run.progress):
            stack.enter_context(contextlib.closing(output))
        _tell_start(run, position, counts)
        for index in range(position.phase.index, len(run.phases)):
            if index > position.phase.index:
                state = enter(run, run.phases[index - 1], run.phases[index], state)
            state, counts = run_phase(run, run.phases[index], state, counts)
    if jax.process_index() == 0:
        print(summarize(workdir, run.phases, read_rows(workdir)))


def _tell_finished(config: Config, workdir: epath.Path, position: Position) -> None:
    """Shows how a finished run went; UserError if rows of it are missing."""
    from_process_0(lambda: check_rows_of(workdir))
    if jax.process_index() == 0:
        print(summarize(workdir, position.phases, read_rows(workdir)))
        print(how_to_train_longer(config))


def _tell_start(run: Run, position: Position, counts: Counts) -> None:
    """Writes and shows the changes since the run was last started."""
    for field, line in position.changed.items():
        if not is_of_training(field):
            run.progress.note(f"changed since this run was last started: {line}")
    run.write_changes(position.phase, position.step or 0, counts)
    device = jax.devices()[0]
    if peak_flops(device) is None:
        run.progress.note(f"no peak FLOP/s is known of {device.device_kind!r}, so no MFU")


def _check(config: Config, position: Position) -> None:
    """Raises UserError if the run cannot work here; evaluates every phase abstractly."""
    check_backend(config)
    estimates = check(config, jax.device_count(), device_memory(), position.marker)
    check_probes(config, estimates, device_memory())
    check_sinks(config.workdir, **_outputs(config))


def _outputs(config: Config) -> dict[str, Any]:
    """Returns the places that metrics are written to, besides the file of rows."""
    logging = config.logging
    return {"tensorboard": logging.tensorboard, "wandb_project": logging.wandb_project}


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
        Checkpoints(
            run.workdir, phase, config.checkpoints, changes=run.marker.changes
        ) as checkpoints,
        memory_used_by(lambda: f"stage {phase.stage}, step {step}"),
    ):
        run.progress.note(
            f"stage {phase.stage}, {phase.name}: {describe(phase.model)}, "
            f"{num_params(phase.model) / 1e6:.3g}M parameters, {phase.num_steps - step} steps"
        )
        with timed(run.progress, f"compiling the train step of stage {phase.stage}"):
            train_step = run.step_of(phase, following)
        observer = Observer(run, phase, mesh, counts)
        rows = LateRows(run, phase, checkpoints, counts)
        if train_step is None:
            _save_and_exit(run, checkpoints, rows, step, state, counts)
        for batch in run.batches(phase, mesh, counts, phase.num_steps - step):
            if should_stop(run.stop, steps_before + step):
                _save_and_exit(run, checkpoints, rows, step, state, counts)
            state, metrics = train_step(state, batch)
            step, before, counts = step + 1, counts, counts.after(phase.per_step)
            # A stage that ends early, and is known to when it is run again, logs alike.
            is_whole = step == phase.num_steps and phase.stage not in run.marker.ended
            rows.catch_up()
            rows.add(step, counts, metrics, is_whole or counts.passes(logs_every, before))
            reason = observer.look(step, before, counts, state, rows)
            if reason is not None and phase.stage not in run.marker.ended and not is_whole:
                phase = run.end_stage(phase, step, reason)
            is_last = step == phase.num_steps
            if is_last and phase.stage in run.marker.ended:
                rows.write_newest()
                run.write_ending(phase, step, counts)
            if is_last or counts.passes(config.checkpoints.every_tokens, before):
                # Rows are on disk before the checkpoint that makes them final.
                checkpoints.save(step, state, counts, rows.settle())
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
    with (
        jax.set_mesh(target_mesh),
        memory_used_by(lambda: f"the growth into stage {target.stage}"),
    ):
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
        rows = run.flush()
        clear(run.workdir, target)
        lineage = newest_lineage(run.workdir, source)
        with Checkpoints(run.workdir, target, config.checkpoints, lineage) as checkpoints:
            checkpoints.save(0, entered, target.start, rows)
        run.commit(after_entering(run.marker, source, target))
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
    checkpoints.save(step, state, counts, rows.settle())
    checkpoints.wait()
    command = f"{program_name('train')} {shlex.join(sys.argv[1:])}"
    run.progress.note(f"stopped and saved at {counts.tokens:,} tokens; resume with: {command}")
    sys.exit(EXIT_CODE)


def run_command(config: Config, options: ResumeConfig) -> None:
    """Runs the command `train`, the only work of this process, after its command line."""
    with ends_while_compiling(), one_line_errors(), distributed.errors_once():
        distributed.initialize()
        keep_memory()
        train(config, options)
