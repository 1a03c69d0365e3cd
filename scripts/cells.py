"""Runs to be compared, checked before the first starts."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping

import jax

from stackjax.checkpoint.directory import absolute, newest_step
from stackjax.config import Config, EarlyStop
from stackjax.config_file import changed_fields, flatten
from stackjax.run.growth_probe import check_probes
from stackjax.run.sinks import check_sinks
from stackjax.run.validation import open_data
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import num_slices_of
from stackjax.training.expand import expand
from stackjax.training.preflight import check, check_backend, device_memory
from stackjax.training.run_history import read_history

Cells = Mapping[tuple[str, int], Config]
"""Configs by name and seed."""


def check_cells(cells: Cells) -> None:
    """Raises UserError, with the run's name, if a run cannot start or resume.

    Takes seconds: nothing is allocated, and replicates are checked once.
    """
    places: dict[str, str] = {}
    checked = set()
    for (name, seed), config in cells.items():
        label = f"{name}, seed {seed}"
        with named(label):
            if config.workdir in places:
                raise UserError(
                    f"workdir is {config.workdir}, also the directory of "
                    f"{places[config.workdir]}; give each run its own."
                )
            places[config.workdir] = label
            _check_directory(config)
            alike = str(flatten(dataclasses.replace(config, seed=0, workdir="any")))
            if alike not in checked:
                _check_config(config)
                checked.add(alike)


def check_phases(cells: Cells) -> None:
    """Raises UserError, with the run's name, if stages do not fit together.

    Needs no device, so a login node can print commands.
    """
    for (name, seed), config in cells.items():
        with named(f"{name}, seed {seed}"):
            expand(config)


def print_commands(module: str, count: int) -> None:
    """Prints the present command line once for each cell, with `--cell` for `--dry-run`."""
    given = [each for each in sys.argv[1:] if each != "--dry-run"]
    command = shlex.join(["python", "-m", module, *given])
    for place in range(count):
        print(f"{command} --cell {place}")


def pick(cells: Cells, place: int) -> Cells:
    """Returns a single cell; UserError if there is none at this place."""
    if place >= len(cells):
        raise UserError(f"--cell is {place}; the grid has 0 to {len(cells) - 1}.")
    return dict([list(cells.items())[place]])


@contextlib.contextmanager
def named(label: str) -> Iterator[None]:
    """Adds a run's name to a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{label}: {error}") from None


def _check_config(config: Config) -> None:
    if any(stage.until != EarlyStop() for stage in config.stages):
        raise UserError(
            "a stage has `until`, but runs with equal FLOPs need fixed lengths; remove it."
        )
    if config.init_from is not None:
        raise UserError(
            f"init_from is {config.init_from}, but runs with equal FLOPs need new models; "
            f"remove it."
        )
    check_backend(config)
    memory = device_memory()
    estimates = check(
        config, jax.device_count(), memory, num_slices=num_slices_of(jax.devices())
    )
    check_probes(config, estimates, memory)
    open_data(config)


def _check_directory(config: Config) -> None:
    """Raises UserError if another config has trained in the directory."""
    workdir, phases = absolute(config.workdir), expand(config)
    history = read_history(workdir)
    if history.phase or newest_step(workdir, phases[0]) is not None:
        phase = phases[min(history.phase, len(phases) - 1)]
        changed_fields(workdir, config, phase.stage)
    check_sinks(config.logging, workdir)
