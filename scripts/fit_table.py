"""Writes docs/fit_table.md: train steps of all configs, compiled for described machines.

    pip install "jax[cuda13]" "jax[tpu]"
    python -m scripts.fit_table

No device is needed. Results are kept in `--results`, one file for each config and machine; only
missing files are made, so the same command goes on after a stop.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from scripts.page import replace_table
from stackjax.accelerators.environment import expect_no_devices
from stackjax.accelerators.fit import describe_machine
from stackjax.accelerators.measure import Machine, Measured, measure
from stackjax.accelerators.programs import Program, step_program
from stackjax.accelerators.remedies import candidates
from stackjax.config import Config
from stackjax.config_file import read_config
from stackjax.model.flops import num_params
from stackjax.runtime.command_line import parse, silence_absl
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Text
from stackjax.runtime.ranges import Length
from stackjax.runtime.text_table import markdown_table
from stackjax.sharding.mesh import build_mesh, num_slices_of
from stackjax.sharding.partition import num_shards
from stackjax.training.expand import expand
from stackjax.training.phase import Phase
from stackjax.training.preflight import check_phase

MACHINES = (
    "h100:1",
    "h100:8",
    "h100:8x8",
    "h200:8",
    "b200:8",
    "a100-40:8",
    "a100-80:8",
    "v5e:4x4",
    "v5e:16x16",
    "v6e:8x8",
    "v5p:2x2x2",
    "v5p:8x8x4",
)
"""From one H100 to a v5p-512 slice: TPU v5p counts two cores for each of its 256 chips."""
_TOKENS = 16_384
"""Most tokens on a device in the first microbatch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig(Checked):
    """Compiles the train steps of configs for described machines, and writes a table."""

    configs: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=1000)] = ()
    """Config files; by default every config for accelerators in `configs/`."""
    devices: Annotated[tuple[Text, ...], Length(at_most=1000)] = MACHINES
    """Machines, as for `stackjax fit`."""
    results: Path = Path("runs/fit_table")
    """Directory of results."""
    page: Path = Path("docs/fit_table.md")
    """Page whose tables are replaced."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        expect_no_devices()
        silence_absl()
        write(parse(TableConfig, prog="python -m scripts.fit_table"))


def write(options: TableConfig) -> None:
    """Compiles what has no result yet, and replaces the page's tables."""
    configs = options.configs or accelerator_configs()
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.devices:
        missing = [path for path in configs if not _result(options, path, name).exists()]
        if missing:
            machine, known = describe_machine(name), {}
            for path in missing:
                text = json.dumps(list(fit_steps(read_config(path), machine, known)), indent=1)
                _result(options, path, name).write_text(text, encoding="utf-8")
                print(f"{path} on {name}", flush=True)
    tables = (_section(options, path) for path in configs)
    replace_table(options.page, "tables", "\n\n".join(tables))


def accelerator_configs() -> tuple[Path, ...]:
    """Returns the config files of runs that need an accelerator."""
    paths = sorted(Path("configs").glob("*.py"))
    return tuple(path for path in paths if read_config(path).platform == "accelerator")


def _result(options: TableConfig, path: Path, machine: str) -> Path:
    return options.results / f"{path.stem}_{machine.replace(':', '_')}.json"


Known = dict[Any, dict[str, Any]]
"""Results by program, for programs of several configs."""


def fit_steps(config: Config, machine: Machine, known: Known) -> Iterator[dict[str, Any]]:
    """Yields the result for each phase's train step, with the smallest change that fits."""
    for phase in expand(config):
        phase = dataclasses.replace(phase, accumulate=_first_accumulate(config, phase, machine))
        program = step_program(config, phase)
        if program.key not in known:
            known[program.key] = _fit_step(config, program, machine)
        params = num_params(phase.model)
        yield {"name": program.name, "params": params, **known[program.key]}


def _first_accumulate(config: Config, phase: Phase, machine: Machine) -> int:
    """Returns the fewest microbatches of at most `_TOKENS` tokens on a device."""
    with jax.set_mesh(build_mesh(phase.mesh, machine.devices)):
        rows = phase.batch_size // num_shards("batch")
    accumulate = 1
    while rows % (2 * accumulate) == 0 and rows * config.data.seq_len > _TOKENS * accumulate:
        accumulate *= 2
    return accumulate


def _fit_step(config: Config, program: Program, machine: Machine) -> dict[str, Any]:
    num_slices = num_slices_of(machine.devices)
    try:
        check_phase(
            config, program.phase, len(machine.devices), machine.memory, num_slices=num_slices
        )
    except UserError as error:
        return {"refusal": str(error)}
    others = (each.program for each in candidates(config, program, machine.devices))
    for each in (program, *others):
        measured = measure(config, each, machine)
        if measured.fits:
            return _summary(each.phase, measured)
    return {"refusal": "too large with every accumulate and remat"}


def _summary(phase: Phase, measured: Measured) -> dict[str, Any]:
    assert measured.costs is not None and measured.bounds is not None and measured.mfu
    wire = {sync: measured.costs.wire_bytes(is_synchronous=sync) for sync in (True, False)}
    return {
        "accumulate": phase.accumulate,
        "remat": phase.model.remat,
        "attention": measured.attention,
        "peak_bytes": measured.peak_bytes,
        "usable_bytes": measured.usable_bytes,
        "synchronous_bytes": wire[True],
        "wire_bytes": wire[True] + wire[False],
        "seconds": measured.bounds.estimate,
        "mfu": measured.mfu,
    }


_HEAD = (
    "devices",
    "step",
    "parameters",
    "accumulate",
    "remat",
    "peak GiB",
    "of GiB",
    "wire GB",
    "synchronous",
    "step s",
    "MFU %",
)


def _section(options: TableConfig, path: Path) -> str:
    """Returns a config's heading and table."""
    lines = []
    for name in options.devices:
        for step in json.loads(_result(options, path, name).read_text(encoding="utf-8")):
            lines.append(_line(name, step))
    return f"## {path}\n\n{markdown_table(_HEAD, lines)}"


def _line(machine: str, step: dict[str, Any]) -> Sequence[str]:
    start = machine, step["name"].removesuffix(" step"), f"{step['params'] / 1e9:.2f}B"
    if "refusal" in step:
        return *start, "too large", *("-",) * (len(_HEAD) - 4)
    return (
        *start,
        str(step["accumulate"]),
        step["remat"],
        f"{step['peak_bytes'] / 2**30:.1f}",
        f"{step['usable_bytes'] / 2**30:.1f}",
        f"{step['wire_bytes'] / 1e9:.1f}",
        f"{step['synchronous_bytes'] / 1e9:.1f}",
        f"{step['seconds']:.2f}",
        f"{100 * step['mfu']:.0f}",
    )


if __name__ == "__main__":
    main()
