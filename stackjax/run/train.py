"""The training run, top to bottom: resume; step, evaluate and save; grow between phases."""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
from etils import epath

from stackjax.checkpoint.directory import absolute
from stackjax.checkpoint.restore import check_rows_of
from stackjax.checkpoint.save import Checkpoints
from stackjax.config import Config
from stackjax.config_file import is_of_training, same_everywhere
from stackjax.data.manifest import data_digest
from stackjax.data.open import Source
from stackjax.data.overlap import check_held_out
from stackjax.data.sources import TokenSource
from stackjax.files.rows_file import read_rows
from stackjax.files.run_lock import run_lock
from stackjax.inference.run_tokenizer import copy_data_tokenizer
from stackjax.model.flops import active, describe, num_params, peak_flops
from stackjax.options import ResumeConfig, TrainOptions
from stackjax.run.averaging import check_averages
from stackjax.run.compile_ahead import compile_ahead, ends_while_compiling
from stackjax.run.compile_all import compile_all
from stackjax.run.early_stop import end_at_budget, log_early_end
from stackjax.run.evaluation_hooks import evaluation_hooks
from stackjax.run.goodput import Clock
from stackjax.run.growth_probe import check_probes, probe_hooks
from stackjax.run.hooks import Hook, StepInfo, check_hooks, run_hooks
from stackjax.run.init_from import check_start, state_at
from stackjax.run.profiler import Profiler, check_profile
from stackjax.run.progress import open_progress, timed
from stackjax.run.resume import NEWEST, Position, commit_position, find_position
from stackjax.run.run import Run
from stackjax.run.seam import enter
from stackjax.run.sinks import check_sinks, open_sinks
from stackjax.run.step_log import StepLog
from stackjax.run.summary import how_to_train_longer, summarize
from stackjax.run.task_scores import task_hooks
from stackjax.run.validation import open_data
from stackjax.run.watchdog import expect_step
from stackjax.runtime import distributed
from stackjax.runtime.agreement import check_agreement, from_process_0, program
from stackjax.runtime.command_line import program as program_name
from stackjax.runtime.cpu_memory import keep_memory
from stackjax.runtime.errors import memory_used_by, one_line_errors
from stackjax.runtime.preemption import EXIT_CODE, should_stop, stop_on_signals
from stackjax.sharding.mesh import build_mesh, num_slices_of
from stackjax.sharding.platform import platform_of, target_device
from stackjax.training.batches import check_epochs, describe_sources
from stackjax.training.compile import (
    step_inputs,
    use_compilation_cache,
)
from stackjax.training.phase import Counts, Phase, StepInputs
from stackjax.training.preflight import check, check_backend, device_memory
from stackjax.training.spikes import SpikeStatistics, plain_statistics, spike_inputs
from stackjax.training.stages import stage_models
from stackjax.training.train_state import TrainState, placed


def train(
    config: Config,
    options: ResumeConfig = NEWEST,
    hooks: Sequence[Hook] = (),
    *,
    dry_run: bool = False,
) -> None:
    """Trains a run from the position in the run directory.

    On an accelerator the train steps of all phases are compiled first.

    Args:
      hooks: Functions to call at chosen steps, besides evaluation, probes and tasks.
      dry_run: Stop after all checks and compilations, without training. Only the compilation
        cache is written.

    Raises:
      UserError: The config, the data, the hosts or the run directory do not fit together.
      OSError: A file could not be read or written.
      FloatingPointError: The loss is not finite.
      SystemExit: After a signal to stop; the run is saved.
    """
    check_hooks(hooks)
    clock, workdir = Clock(), absolute(config.workdir)
    check_agreement(program() | same_everywhere(config))
    with contextlib.ExitStack() as stack:
        # From here on no other run changes the directory.
        stack.enter_context(run_lock(workdir))
        position = from_process_0(lambda: find_position(workdir, config, options))
        if position.is_finished:
            _show_finished(config, workdir, position)
            return
        sources, validation = _check(config, position)
        manifests = [source.manifest for source in sources]
        hooks = (*task_hooks(config), *hooks)
        stop = stack.enter_context(stop_on_signals())
        stack.callback(expect_step, None)
        progress = stack.enter_context(contextlib.closing(open_progress()))
        use_compilation_cache(workdir)
        step_of = compile_ahead(config, stop)
        if dry_run or platform_of(target_device()) != "cpu":
            with clock.measure("compile"):
                compile_all(position, step_of, progress, device_memory())
        if dry_run:
            return
        from_process_0(lambda: commit_position(workdir, config, position, manifests))
        copy_data_tokenizer(config.data.all_sources[0].path, workdir)
        with clock.measure("restore"):
            state, counts, rows, spikes = state_at(config, workdir, position)
            state = placed(position.phase, state)
        resume_at = None if counts == Counts() else (position.phase.index, counts.tokens)
        run = Run(
            config=config,
            workdir=workdir,
            sources=sources,
            validation=validation,
            sinks=open_sinks(config, workdir, resume_at, rows),
            progress=progress,
            profiler=stack.enter_context(Profiler(config.logging, workdir, progress)),
            clock=clock,
            stop=stop,
            step_of=step_of,
            history=position.history,
            phases=position.phases,
        )
        for sink in run.sinks:
            stack.enter_context(contextlib.closing(sink))
        if resume_at is not None:
            clock.resume(from_process_0(lambda: read_rows(workdir)))
        _show_start(run, position, counts)
        _train_phases(run, position, state, counts, hooks, spikes)
    if jax.process_index() == 0:
        print(summarize(workdir, run.phases, read_rows(workdir)))


def _train_phases(
    run: Run,
    position: Position,
    state: TrainState,
    counts: Counts,
    hooks: Sequence[Hook],
    spikes: SpikeStatistics | None,
) -> None:
    """Trains all phases from a position on."""
    index = position.phase.index
    while index < len(run.phases):  # fewer after an early end
        if index > position.phase.index:
            state = enter(run, run.phases[index - 1], run.phases[index], state)
        state, counts = run_phase(run, run.phases[index], state, counts, hooks, spikes)
        spikes = None  # a seam is no spike
        index += 1


def _show_finished(config: Config, workdir: epath.Path, position: Position) -> None:
    """Shows a finished run's summary; UserError if rows are missing."""
    from_process_0(lambda: check_rows_of(workdir))
    if jax.process_index() == 0:
        print(summarize(workdir, position.phases, read_rows(workdir)))
        print(how_to_train_longer(config))


def _show_start(run: Run, position: Position, counts: Counts) -> None:
    """Writes and shows the changes since the run's last start."""
    for field, line in position.changed.items():
        if not is_of_training(field):
            run.progress.note(f"changed since the last start: {line}")
    for line in describe_sources(run.config, run.sources, run.phases):
        run.progress.note(line)
    run.write_changes(position.phase, position.step or 0, counts)
    device = jax.devices()[0]
    if peak_flops(device) is None:
        run.progress.note(f"peak FLOP/s of {device.device_kind!r} is unknown, so no MFU")


def _check(
    config: Config, position: Position
) -> tuple[tuple[Source, ...], tuple[TokenSource, ...]]:
    """Returns training and validation data.

    Raises:
      UserError: The run cannot work here. Every phase is evaluated abstractly.
    """
    check_backend(config)
    estimates = check(
        config,
        jax.device_count(),
        device_memory(),
        position.history,
        num_slices_of(jax.devices()),
    )
    check_averages(config, position.phases[position.phase.index :])
    check_probes(config, estimates, device_memory())
    check_sinks(config.logging, config.workdir)
    check_profile(config.logging, absolute(config.workdir))
    sources, validation = open_data(config)
    digest = data_digest([source.manifest for source in sources])
    check_agreement({"the data at data.path": digest})
    check_epochs(config, sources, position.phases)
    if position.step is None:
        from_process_0(lambda: check_held_out(config.data.all_sources))
    if position.step is None and config.init_from is not None:
        # The model before the stage's own rotary positions.
        model, path = stage_models(config)[0], config.data.all_sources[0].path
        check_start(config.init_from, model, path)
    return sources, validation


def run_phase(
    run: Run,
    phase: Phase,
    state: TrainState,
    counts: Counts,
    hooks: Sequence[Hook] = (),
    spikes: SpikeStatistics | None = None,
) -> tuple[TrainState, Counts]:
    """Returns a phase's last state and counts, everything logged and saved.

    Args:
      state: The state to start with, as from `placed`.
      spikes: The statistics saved with the state; None at the start of a phase.
    """
    config, step, mesh = run.config, int(state.step), build_mesh(phase.mesh)
    if step == phase.num_steps:
        return state, counts
    steps_before = sum(earlier.num_steps for earlier in run.phases[: phase.index])
    with (
        jax.set_mesh(mesh),
        run.clock.measure("checkpoint"),
        Checkpoints(
            run.workdir, phase, config.checkpoints, changes=run.history.changes
        ) as checkpoints,
        run.clock.measure("step"),
        memory_used_by(lambda: f"stage {phase.stage}, step {step}"),
    ):
        train_step = _compiled_step(run, phase, step)
        inputs = step_inputs(phase, spike_inputs(config.spikes, spikes))
        log = StepLog(run, phase, checkpoints, counts)
        # A step's rows are written in this order.
        evaluation = evaluation_hooks(run, phase, counts)
        hooks = (*evaluation, *probe_hooks(run, phase), *hooks)
        if train_step is None:
            _save(run, checkpoints, log, step, state, counts, inputs)
            _exit_saved(run, checkpoints, counts)
        for batch in run.batches(phase, mesh, counts, phase.num_steps - step):
            if should_stop(run.stop, steps_before + step):
                _save(run, checkpoints, log, step, state, counts, inputs)
                _exit_saved(run, checkpoints, counts)
            with run.profiler.step(steps_before + step + 1):
                state, metrics = train_step(inputs, state, batch)
            run.profiler.end_step(steps_before + step + 1, metrics["is_finite"])
            inputs = inputs._replace(spikes=metrics.pop("spikes", None))
            step, counts = step + 1, counts.after(phase.per_step)
            info = StepInfo(run, phase.index, mesh, step, counts, state)
            log.add(info, metrics)
            end_at_budget(info)
            run_hooks(hooks, info, log.paused)
            if info.ends_phase:
                log_early_end(info, log)
            if info.ends_phase or info.reaches_multiple(config.checkpoints.every_tokens):
                _save(run, checkpoints, log, step, state, counts, inputs)
            if info.ends_phase:
                break
    return state, counts


def _compiled_step(run: Run, phase: Phase, step: int) -> jax.stages.Compiled | None:
    """Returns a phase's compiled train step; None after a signal to stop."""
    run.progress.note(
        f"stage {phase.stage}, {phase.name}: {describe(phase.model)}, "
        f"{num_params(phase.model) / 1e6:.3g}M parameters{active(phase.model)}, "
        f"{phase.num_steps - step} steps"
    )
    following = next(iter(run.phases[phase.index + 1 :]), None)
    is_seam = phase.index > 0 and step == 0
    with (
        run.clock.measure("seam" if is_seam else "compile"),
        timed(run.progress, f"compiling the train step of stage {phase.stage}"),
    ):
        return run.step_of(phase, following)


def _save(
    run: Run,
    checkpoints: Checkpoints,
    log: StepLog,
    step: int,
    state: TrainState,
    counts: Counts,
    inputs: StepInputs,
) -> None:
    """Starts saving; rows are on disk before the checkpoint that refers to them."""
    rows = log.settle()
    with run.clock.measure("checkpoint"):
        checkpoints.save(step, state, counts, rows, plain_statistics(inputs.spikes))


def _exit_saved(run: Run, checkpoints: Checkpoints, counts: Counts) -> NoReturn:
    """Ends the process after a signal, once the checkpoint is complete."""
    checkpoints.wait()
    command = f"{program_name('train')} {shlex.join(sys.argv[1:])}"
    run.progress.note(f"stopped and saved at {counts.tokens:,} tokens; resume with: {command}")
    sys.exit(EXIT_CODE)


def run_command(config: Config, options: TrainOptions, owns_process: bool) -> None:
    """Runs the command `train`.

    Args:
      owns_process: End the process without waiting for the compiler.
    """
    leave = ends_while_compiling() if owns_process else contextlib.nullcontext()
    with leave, one_line_errors(), distributed.errors_once():
        distributed.initialize()
        keep_memory()
        train(config, options.resume, dry_run=options.dry_run)
