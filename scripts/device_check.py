"""Compares what `stackjax fit` predicts with the devices of this machine.

    python -m scripts.device_check h200:1

Predicts memory and time of each train step of a config, measures them, and trains a few steps
through the growth. This takes about ten minutes on one GPU. Any config field may be overridden.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scripts.page import replace_table
from stackjax.config import Config
from stackjax.config_file import load_config
from stackjax.files.json_file import Fields, read_object
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Size, Text
from stackjax.runtime.text_table import markdown_table

_STEPS = 5
"""Steps to time singly, to time back to back, and to train in each stage."""
_ACCUMULATE = 2
_PROG = "python -m scripts.device_check"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig(Checked):
    """Compares predictions with the devices of this machine; accepts any config field."""

    devices: Annotated[Text, tyro.conf.Positional]
    """The machine's devices, as for `stackjax fit`."""
    config: Path = Path("configs/gstack_1b.py")
    """A config with growth."""
    batch_size: Size = 16
    """Sequences in a step: few, so that steps are short. With more than 8 devices, use more."""
    results: Path = Path("runs/device_check")
    """New directory for logs, results and the run."""
    page: Path = Path("docs/accelerators.md")
    """Page whose table is replaced."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options, overrides = parse(CheckConfig, prog=_PROG, return_unknown_args=True)
        check(options, overrides)


def check(options: CheckConfig, overrides: Sequence[str]) -> None:
    """Runs all commands, and replaces the page's table.

    A failed command does not end the check, because a rented machine costs money: the other
    results are written first.

    Raises:
      UserError: A command failed, or the directory of results exists.
    """
    config = load_config(_PROG, ["--config", str(options.config), *overrides])
    if options.results.exists():
        raise UserError(f"--results is {options.results}, which exists; name a new directory.")
    options.results.mkdir(parents=True)
    failed = [
        name
        for name, command in commands(options, config, overrides).items()
        if not _succeeds(name, command, options.results / f"{name}.log")
    ]
    table = comparison(options.results, len(config.stages))
    print(table)
    replace_table(options.page, "measured", table)
    if failed:
        raise UserError(
            f"{', '.join(failed)} failed; see {options.results}/{failed[0]}.log for the reason."
        )


def commands(
    options: CheckConfig, config: Config, overrides: Sequence[str]
) -> dict[str, list[str]]:
    """Returns the commands by name: prediction, a measurement of each stage, and a run."""
    results, stages = options.results, range(len(config.stages))
    same = [*overrides, *_for_stages(stages, "batch-size", options.batch_size)]
    same += _for_stages(stages, "accumulate", _ACCUMULATE)
    fit = ["stackjax.fit", "--config", str(options.config), *same]
    fit += ["--devices", options.devices, "--json", str(results / "fit.json")]
    benchmark = ["scripts.benchmark", str(options.config), *same]
    benchmark += ["--sections", "step", "--steps", str(_STEPS)]
    run = ["stackjax.train", "--config", str(options.config), *same]
    run += _for_stages(stages, "tokens", _STEPS * options.batch_size * config.data.seq_len)
    run += ["--optimizer.schedule.warmup-tokens", "1", "--workdir", str(results / "run")]
    run += ["--data.path", str(results / "data"), "--data.corpus", "stdlib"]
    # A process each: the peak of a device's memory cannot be reset.
    measured = {
        f"stage_{stage}": [
            *benchmark,
            *("--phases", str(stage), "--out", str(results / f"stage_{stage}.json")),
        ]
        for stage in stages
    }
    modules = {"fit": fit, **measured, "run": run}
    return {name: [sys.executable, "-m", *args] for name, args in modules.items()}


def _for_stages(stages: Iterable[int], field: str, value: int) -> list[str]:
    """Returns the override of a field in all stages."""
    return [text for stage in stages for text in (f"--stages.{stage}.{field}", str(value))]


def _succeeds(name: str, command: Sequence[str], log: Path) -> bool:
    """Runs a command, and shows and keeps the output; returns whether the exit code is 0."""
    print(f"{name}: {' '.join(command)}", flush=True)
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None, "the output is a pipe"
        for line in process.stdout:
            file.write(line)
            print(line, end="", flush=True)
    return process.returncode == 0


_HEAD = (
    "step",
    "peak GiB, predicted",
    "measured",
    "ratio",
    "step s, at least",
    "estimated",
    "measured",
    "ratio",
    "MFU %, estimated",
    "measured",
)


def comparison(results: Path, num_stages: int) -> str:
    """Returns a table of predicted and measured steps, with `-` for missing numbers."""
    programs = _read(results / "fit.json").get("programs", ())
    predicted = {program["name"]: program for program in programs}
    lines = []
    for stage in range(num_stages):
        rows = _read(results / f"stage_{stage}.json").get("rows", ())
        steps = (row["values"] for row in rows if row["section"] == "step")
        program = predicted.get(f"stage {stage} step", {})
        lines.append([f"stage {stage}", *_cells(program, next(steps, {}))])
    return markdown_table(_HEAD, lines)


def _read(path: Path) -> Fields:
    """Returns a JSON file's content; nothing if the command that writes it failed."""
    if not path.exists():
        return {}
    return read_object(path, "remove this file, and check again", dict)


def _cells(program: Fields, step: Fields) -> list[str]:
    """Returns a line's numbers."""
    bounds = program.get("bounds") or {}
    least = max((bounds[name] for name in ("flops", "memory", "wire") if bounds), default=None)
    peaks = program.get("peak_bytes"), step.get("device_peak_bytes")
    seconds = bounds.get("estimate"), step.get("median_seconds")
    shares = program.get("mfu"), step.get("mfu")
    return [
        *(_scaled(peak, 2**30) for peak in peaks),
        _ratio(*peaks),
        _scaled(least, 1),
        *(_scaled(each, 1) for each in seconds),
        _ratio(*seconds),
        *(_scaled(share, 0.01) for share in shares),
    ]


def _scaled(value: Any, unit: float) -> str:
    # A benchmark gives the reason in place of a number that it could not measure.
    return f"{value / unit:.2f}" if isinstance(value, float | int) else "-"


def _ratio(predicted: Any, measured: Any) -> str:
    numbers = isinstance(predicted, float | int) and isinstance(measured, float | int)
    return f"{measured / predicted:.3f}" if numbers else "-"


if __name__ == "__main__":
    main()
