"""Writes docs/fit_table.md and .png: all configs' train steps, compiled for described machines.

    pip install "jax[cuda13]" "jax[tpu]"
    python -m scripts.fit_table

No device is needed. Results are kept in `--results`, one file for each step and machine; only
missing files are made, so the same command goes on after a stop. After a change of the model or
the compiler, use another directory.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from scripts.page import replace_table
from stackjax.accelerators.environment import expect_no_devices
from stackjax.accelerators.fit import describe_machine
from stackjax.accelerators.measure import Machine, Measured, measure
from stackjax.accelerators.programs import step_program
from stackjax.accelerators.remedies import candidates
from stackjax.config import Config, Schedule
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
Step = dict[str, Any]
"""What is known of a train step on a machine."""

_TOKENS = 16_384
"""Most tokens on a device in the first microbatch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig(Checked):
    """Compiles the train steps of configs for described machines, and writes a table."""

    configs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, Length(at_least=0, at_most=1000)
    ] = ()
    """Config files; by default every config for accelerators in `configs/`."""
    devices: Annotated[tuple[Text, ...], Length(at_most=1000)] = MACHINES
    """Machines, as for `stackjax fit`."""
    results: Path = Path("runs/fit_table")
    """Directory of results."""
    page: Path = Path("docs/fit_table.md")
    """Page whose tables are replaced; the picture lies beside it."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        expect_no_devices()
        silence_absl()
        write(parse(TableConfig, prog="python -m scripts.fit_table"))


def write(options: TableConfig) -> None:
    """Compiles what has no result yet, and replaces the page's tables and picture."""
    paths = options.configs or accelerator_configs()
    found = {
        path: {name: fit_steps(path, name, options.results) for name in options.devices}
        for path in paths
    }
    sections = (_section(path, steps) for path, steps in found.items())
    replace_table(options.page, "tables", "\n\n".join(sections))
    draw(found).savefig(options.page.with_suffix(".png"), dpi=100)


def accelerator_configs() -> tuple[Path, ...]:
    """Returns the config files of runs that need an accelerator."""
    paths = sorted(Path("configs").glob("*.py"))
    return tuple(path for path in paths if read_config(path).platform == "accelerator")


def fit_steps(path: Path, devices: str, results: Path) -> list[Step]:
    """Returns the result for each phase's train step, with the smallest change that fits."""
    config = read_config(path)
    steps = []
    for phase in expand(config):
        result = results / f"{devices.replace(':', '_')}_{_digest(config, phase)}.json"
        if not result.exists():
            step = _fit_step(config, phase, _machine(devices))
            results.mkdir(parents=True, exist_ok=True)
            result.write_text(json.dumps(step, indent=1), encoding="utf-8")
            print(f"{path}, stage {phase.stage}, on {devices}", flush=True)
        step = json.loads(result.read_text(encoding="utf-8"))
        name, params = step_program(config, phase).name, num_params(phase.model)
        steps.append({"name": name, "params": params, **step})
    return steps


_machine = functools.cache(describe_machine)


def _digest(config: Config, phase: Phase) -> str:
    """Returns a hash that is equal for equal train steps, also of several configs."""
    optimizer = dataclasses.replace(
        phase.optimizer, peak_learning_rate=1.0, schedule=Schedule()
    )
    source = phase.source if phase.fit else None
    program = dataclasses.replace(phase.program, optimizer=optimizer, source=source)
    text = f"{program} {config.data.mask_documents}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first_accumulate(config: Config, phase: Phase, machine: Machine) -> int:
    """Returns the fewest microbatches of at most `_TOKENS` tokens on a device."""
    with jax.set_mesh(build_mesh(phase.mesh, machine.devices)):
        rows = phase.batch_size // num_shards("batch")
    accumulate = 1
    while rows % (2 * accumulate) == 0 and rows * phase.seq_len > _TOKENS * accumulate:
        accumulate *= 2
    return accumulate


def _fit_step(config: Config, phase: Phase, machine: Machine) -> Step:
    num_slices = num_slices_of(machine.devices)
    phase = dataclasses.replace(phase, accumulate=_first_accumulate(config, phase, machine))
    try:
        check_phase(config, phase, len(machine.devices), machine.memory, num_slices=num_slices)
    except UserError as error:
        return {"refusal": str(error)}
    program = step_program(config, phase)
    others = (each.program for each in candidates(config, program, machine.devices))
    on_devices = (each for each in others if each.phase.moment_memory == "device")
    for each in (program, *on_devices):
        measured = measure(config, each, machine)
        if measured.fits:
            return _summary(each.phase, measured)
    return {"refusal": "too large with every accumulate and remat"}


def _summary(phase: Phase, measured: Measured) -> Step:
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


def draw(found: Mapping[Path, Mapping[str, list[Step]]]) -> Figure:
    """Returns a picture of the estimated MFU of each config's last step on each machine."""
    rows = [[steps[-1].get("mfu") for steps in each.values()] for each in found.values()]
    machines = next(iter(found.values()))
    figure = Figure(figsize=(1.5 + 0.7 * len(machines), 1.5 + 0.4 * len(rows)))
    axes = figure.subplots()
    shares = np.array([[np.nan if mfu is None else 100 * mfu for mfu in row] for row in rows])
    axes.imshow(shares, cmap="YlGn", vmin=20, vmax=90, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        text = "too\nlarge" if np.isnan(share) else f"{share:.0f} %"
        axes.text(column, row, text, ha="center", va="center", fontsize=7 + 2 * (share > 0))
    axes.set_xticks(range(len(machines)), machines, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [path.stem for path in found])
    axes.set_title("Estimated MFU of the last stage's train step")
    figure.tight_layout()
    return figure


def _section(path: Path, found: Mapping[str, list[Step]]) -> str:
    """Returns a config's heading and table."""
    lines = [_line(name, step) for name, steps in found.items() for step in steps]
    return f"## {path}\n\n{markdown_table(_HEAD, lines)}"


def _line(machine: str, step: Step) -> Sequence[str]:
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
