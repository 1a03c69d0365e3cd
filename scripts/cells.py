"""Runs to be compared, checked before the first starts."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import jax

from stackjax.checkpoint.directory import absolute, newest_step
from stackjax.config import Config, EarlyStop
from stackjax.config_file import changed_fields, flatten
from stackjax.run.growth_probe import check_probes
from stackjax.run.sinks import check_sinks
from stackjax.run.validation import open_data
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand
from stackjax.training.preflight import check, check_backend, device_memory
from stackjax.training.run_position import read_marker

Cells = Mapping[tuple[str, int], Config]
"""Configs by name and seed."""


def check_cells(cells: Cells) -> None:
    """Raises UserError, with the name of the run, if a run could not start or resume.

    Takes seconds: nothing is allocated, and replicates are checked once.
    """
    places: dict[str, str] = {}
    checked = set()
    for (name, seed), config in cells.items():
        label = f"{name}, seed {seed}"
        with named(label):
            if config.workdir in places:
                raise UserError(
                    f"workdir is {config.workdir}, which is that of {places[config.workdir]} "
                    f"too; give each run a directory."
                )
            places[config.workdir] = label
            _check_directory(config)
            alike = str(flatten(dataclasses.replace(config, seed=0, workdir="any")))
            if alike not in checked:
                _check_config(config)
                checked.add(alike)


def check_phases(cells: Cells) -> None:
    """Raises UserError, with the name of the run, if its stages do not fit together.

    Needs no device: a login node can do so before it hands out commands.
    """
    for (name, seed), config in cells.items():
        with named(f"{name}, seed {seed}"):
            expand(config)


@contextlib.contextmanager
def named(label: str) -> Iterator[None]:
    """Puts the name of a run before a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{label}: {error}") from None


def _check_config(config: Config) -> None:
    if any(stage.until != EarlyStop() for stage in config.stages):
        raise UserError(
            "a stage has `until`; runs that cost the same end where their FLOPs do, so leave "
            "it out."
        )
    if config.init_from is not None:
        raise UserError(
            f"init_from is {config.init_from}; runs that cost the same begin with new models, "
            f"so leave it out."
        )
    check_backend(config)
    memory = device_memory()
    estimates = check(config, jax.device_count(), memory)
    check_probes(config, estimates, memory)
    open_data(config)


def _check_directory(config: Config) -> None:
    """Raises UserError if another config has trained in the directory."""
    workdir, phases = absolute(config.workdir), expand(config)
    marker = read_marker(workdir)
    if marker.phase or newest_step(workdir, phases[0]) is not None:
        phase = phases[min(marker.phase, len(phases) - 1)]
        changed_fields(workdir, config, phase.stage)
    check_sinks(config.logging, workdir)
