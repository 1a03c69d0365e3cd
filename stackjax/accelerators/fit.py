"""Whether every program of a run fits described devices."""

from stackjax.accelerators.devices import parse_devices
from stackjax.accelerators.measure import Machine, Measured, measure
from stackjax.accelerators.programs import programs
from stackjax.accelerators.remedies import way_out
from stackjax.accelerators.report import report, to_json
from stackjax.accelerators.topology import described_devices, usable_memory
from stackjax.config import Config
from stackjax.options import FitConfig
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import num_slices_of
from stackjax.training.preflight import check, check_backend


def fit(config: Config, options: FitConfig, name: str) -> None:
    """Compiles every program of a run, and prints a report.

    Args:
      name: The config's name in the report.

    Raises:
      UserError: A program does not fit, or the config does not work on the devices.
    """
    machine = describe_machine(options.devices)
    check_backend(config, machine.devices[0])
    num_slices = num_slices_of(machine.devices)
    estimates = check(config, len(machine.devices), num_slices=num_slices)
    found = programs(config, [estimate.phase for estimate in estimates])
    rows = [measure(config, program, machine) for program in found]
    if options.json is not None:
        options.json.write_text(to_json(name, machine.group, rows), encoding="utf-8")
    print(report(name, machine, rows))
    for program, row in zip(found, rows, strict=True):
        if not row.fits:
            raise UserError(f"{_excess(row)}; {way_out(config, program, machine)}.")


def describe_machine(text: str) -> Machine:
    """Returns the devices named on the command line, ready to compile for."""
    group = parse_devices(text)
    devices = described_devices(group)
    return Machine(group=group, devices=devices, memory=usable_memory(group, devices))


def _excess(row: Measured) -> str:
    usable = f"{row.usable_bytes / 2**30:.2f} GiB"
    if row.peak_bytes is None:
        return f"{row.name} does not fit {usable} ({row.refusal.rstrip('.')})"
    return f"{row.name} needs {row.peak_bytes / 2**30:.2f} GiB, but a device has {usable}"
