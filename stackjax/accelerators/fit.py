"""Whether every program of a run fits described devices."""

import functools
from pathlib import Path

from stackjax.accelerators.choice_file import choice_file
from stackjax.accelerators.devices import parse_devices
from stackjax.accelerators.measure import Machine, Measured, measure
from stackjax.accelerators.programs import programs
from stackjax.accelerators.remedies import way_out
from stackjax.accelerators.report import report, to_json
from stackjax.accelerators.search import search, with_choices
from stackjax.accelerators.topology import described_devices, usable_memory
from stackjax.config import Config
from stackjax.config_file import read_config
from stackjax.options import FitConfig
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import num_slices_of
from stackjax.training.preflight import check, check_backend


def fit(config: Config, options: FitConfig, path: Path) -> None:
    """Compiles every program of a run, and prints a report.

    Args:
      path: The config's file.

    Raises:
      UserError: A program does not fit, or the config does not work on the devices.
    """
    if options.write is not None:
        _check_writable(config, options.write, path)
    machine = describe_machine(options.devices, options.target)
    check_backend(config, machine.devices[0])
    if options.search:
        choices = search(config, machine, functools.partial(print, flush=True))
        config = with_choices(config, choices)
        print("".join(f"\nstage {stage}: {choice}" for stage, choice in enumerate(choices)))
        if options.write is not None:
            text = choice_file(path, options.write, options.devices, choices)
            options.write.write_text(text, encoding="utf-8")
    num_slices = num_slices_of(machine.devices)
    estimates = check(config, len(machine.devices), num_slices=num_slices)
    found = programs(config, [estimate.phase for estimate in estimates])
    rows = [measure(config, program, machine) for program in found]
    if options.json is not None:
        text = to_json(str(path), machine.group, rows)
        options.json.write_text(text, encoding="utf-8")
    print(report(str(path), machine, rows))
    for program, row in zip(found, rows, strict=True):
        if not row.fits:
            raise UserError(f"{_excess(row)}; {way_out(config, program, machine)}.")


def _check_writable(config: Config, target: Path, path: Path) -> None:
    """Raises UserError if a config file cannot be written before the search."""
    if target.exists() or not target.parent.is_dir():
        state = "exists already" if target.exists() else "is in a directory that does not exist"
        raise UserError(f"--write is {target}, which {state}; give the path of a new file.")
    if config != read_config(path):
        raise UserError(
            f"--write refers to {path} for all other fields, so they cannot be overridden; "
            f"change them in the file."
        )


def describe_machine(text: str, target: Path | None = None) -> Machine:
    """Returns the devices named on the command line, ready to compile for.

    Args:
      target: A GPU's own description, as for `parse_devices`.
    """
    group = parse_devices(text, target)
    devices = described_devices(group)
    return Machine(group=group, devices=devices, memory=usable_memory(group, devices))


def _excess(row: Measured) -> str:
    usable = f"{row.usable_bytes / 2**30:.2f} GiB"
    if row.peak_bytes is None:
        return f"{row.name} does not fit {usable} ({row.refusal.rstrip('.')})"
    return f"{row.name} needs {row.peak_bytes / 2**30:.2f} GiB, but a device has {usable}"
