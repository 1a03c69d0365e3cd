"""Measures a config's cost on this machine, and writes a JSON file.

    python -m scripts.benchmark configs/gstack_1b.py --stages.1.mesh.fsdp 8

Any config field may be overridden, as with `python -m stackjax.train`.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from absl import logging
from jax.sharding import Mesh

from scripts.measure.ahead import measure_ahead
from scripts.measure.choices import measure_choices
from scripts.measure.inference import measure_inference
from scripts.measure.loop import measure_host, measure_loader
from scripts.measure.machine import VARIABLES, cpu_model, measure_machine, num_cores
from scripts.measure.result import NotMeasured, Row, attempt
from scripts.measure.seam import cases, measure_saves, measure_seam
from scripts.measure.step import (
    Times,
    compile_phase,
    describe,
    measure_flops,
    measure_times,
)
from scripts.measure.text import lines
from stackjax.config import Config
from stackjax.config_file import flatten, load_config
from stackjax.files.output import check_writable
from stackjax.model.module import compute_dtype
from stackjax.runtime import distributed
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.cpu_memory import keep_memory
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Count, Positive, Size, Text
from stackjax.sharding.mesh import build_mesh
from stackjax.training.expand import expand
from stackjax.training.phase import Phase
from stackjax.training.preflight import check

SECTIONS = ("loader", "growth", "checkpoint", "step", "ahead", "host", "inference")
"""Ordered by memory, smallest first."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Checked):
    """Measures a config's cost on this machine; accepts any config field."""

    config: Annotated[Path, tyro.conf.Positional]
    """A config file, such as configs/tiny.py."""
    sections: tuple[Text, ...] = SECTIONS
    """Measurements to make."""
    phases: tuple[Count, ...] = ()
    """Indices of phases to measure; by default all."""
    steps: Size = 20
    """Timed steps, first singly, then back to back."""
    limit_seconds: Positive = 600
    """Skip measurements with a longer expected time."""
    ablate: bool = False
    """Measure the step with each execution option changed."""
    profile: Path | None = None
    """Directory for an XProf trace of a few steps per phase."""
    out: Path = Path("benchmark.json")
    """JSON file to write."""


def main() -> None:
    """Runs the command line."""
    logging.set_verbosity(logging.FATAL)
    # Compile times are for a first start.
    jax.config.update("jax_enable_compilation_cache", False)
    with one_line_errors():
        prog = "python -m scripts.benchmark"
        options, overrides = parse(BenchmarkConfig, prog=prog, return_unknown_args=True)
        config = load_config(prog, ["--config", str(options.config), *overrides])
        distributed.initialize()
        keep_memory()
        benchmark(options, config)


def benchmark(options: BenchmarkConfig, config: Config) -> None:
    """Measures and prints, and writes the JSON file.

    Raises:
      UserError: A section or phase does not exist, or the config does not fit the devices.
    """
    phases = expand(config)
    _check_options(options, phases)
    check(config, jax.device_count())
    report = environment("scripts.benchmark") | {"config": flatten(config), "rows": []}

    def add(row: Row) -> None:
        report["rows"].append(dataclasses.asdict(row))
        if jax.process_index() == 0:
            print(lines(report["rows"][-1]), flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")

    dtype = compute_dtype(config.model)
    add(Row(section="machine", case=str(dtype), values=measure_machine(dtype)))
    for phase in phases:
        if not options.phases or phase.index in options.phases:
            source = phases[phase.index - 1] if phase.index > 0 else None
            _measure_phase(options, config, source, phase, add)
    if jax.process_index() == 0:
        print(f"{options.out}: all of this, for python -m scripts.performance")


def environment(module: str) -> dict[str, Any]:
    """Returns software versions, hardware and environment variables.

    Args:
      module: The module of this command.
    """
    devices = jax.devices()
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
        "cpu": cpu_model(),
        "num_cores": num_cores(),
    } | {name: os.environ.get(name, "") for name in VARIABLES}


def _check_options(options: BenchmarkConfig, phases: Sequence[Phase]) -> None:
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        raise UserError(
            f"--sections has {unknown[0]!r}, which is none of {', '.join(SECTIONS)}."
        )
    if unknown := [index for index in options.phases if not 0 <= index < len(phases)]:
        raise UserError(
            f"--phases has {unknown[0]}; those of the run are 0 to {len(phases) - 1}."
        )
    check_writable("--out", options.out)


def _measure_phase(
    options: BenchmarkConfig,
    config: Config,
    source: Phase | None,
    phase: Phase,
    add: Callable[[Row], None],
) -> None:
    """Adds a row for each measurement in a phase.

    Args:
      source: The phase before.
    """

    def record(section: str, measure: Callable[[], Any], case: str = "") -> None:
        add(Row(section=section, phase=phase.directory, case=case, values=attempt(measure)))

    sections, mesh = options.sections, build_mesh(phase.mesh)
    limits = (options.steps, options.limit_seconds)
    with jax.set_mesh(mesh):
        record("model", lambda: describe(config, phase))
        if phase.fit is not None:
            reason = "the step that fits a learned growth is not the model's"
            add(Row(section="step", phase=phase.directory, values=NotMeasured(reason)))
            return
        if "loader" in sections:
            record("loader", lambda: measure_loader(config, phase, mesh, options.steps))
        if "growth" in sections and source is not None:
            for grown in cases(phase):
                seam = functools.partial(measure_seam, config, source, phase, grown)
                record("growth", seam, grown)
        if "checkpoint" in sections:
            record("checkpoint", lambda: measure_saves(config, phase, mesh))
        times = NotMeasured("the step is not among --sections")
        if "step" in sections:
            times = _measure_step(options, config, phase, mesh, add)
        if options.ablate:
            for name, choice in measure_choices(config, phase, mesh, *limits).items():
                record("choice", lambda choice=choice: choice, name)
        if "ahead" in sections and source is not None and source.fit is None:
            record("ahead", lambda: measure_ahead(config, source, phase, *limits))
        if "host" in sections:
            record("host", lambda: measure_host(config, phase, mesh, times))
        if "inference" in sections:
            record("inference", lambda: measure_inference(config, phase, mesh))


def _measure_step(
    options: BenchmarkConfig,
    config: Config,
    phase: Phase,
    mesh: Mesh,
    add: Callable[[Row], None],
) -> Times | NotMeasured:
    """Adds a step's cost; returns the step times."""
    row = functools.partial(Row, phase=phase.directory)
    add(row(section="flops", values=measure_flops(config, phase, mesh)))
    compiled = attempt(lambda: compile_phase(config, phase, mesh))
    if isinstance(compiled, NotMeasured):
        add(row(section="compile", values=compiled))
        return compiled
    step, program = compiled
    add(row(section="compile", values=program))
    times = attempt(
        lambda: measure_times(
            config,
            phase,
            mesh,
            step=step,
            program=program,
            num_steps=options.steps,
            limit_seconds=options.limit_seconds,
            profile=options.profile,
        )
    )
    add(row(section="step", values=times))
    return times


if __name__ == "__main__":
    main()
