"""Measures the speed of data on this machine, and writes a JSON file.

    python -m scripts.benchmark_data

Reads synthetic token shards, and prepares the built-in corpus.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from scripts.benchmark import environment
from scripts.measure.machine import measure_machine
from scripts.measure.mixtures import measure_mixtures
from scripts.measure.preparation import measure_preparation
from scripts.measure.result import Row
from scripts.measure.text import lines
from stackjax.data.config import SeqLen
from stackjax.files.output import check_writable
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import one_line_errors
from stackjax.runtime.numbers import Count, Size
from stackjax.runtime.ranges import Length

DTYPE = "float32"
PREPARATION_TURNS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataBenchmarkConfig(Checked):
    """Measures the speed of data on this machine."""

    seq_lens: Annotated[tuple[SeqLen, ...], Length(at_least=0, at_most=10)] = (2048, 512)
    """Tokens per sequence, for the loader."""
    turns: Size = 31
    """Turns of each loader."""
    copies: Count = 4
    """How often the built-in corpus is prepared together; 0 leaves preparation out."""
    out: Path = Path("benchmark_data.json")
    """JSON file to write."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        benchmark_data(parse(DataBenchmarkConfig, prog="python -m scripts.benchmark_data"))


def benchmark_data(options: DataBenchmarkConfig) -> None:
    """Measures and prints, and writes the JSON file."""
    check_writable("--out", options.out)
    report = environment("scripts.benchmark_data") | {"rows": []}

    def add(row: Row) -> None:
        report["rows"].append(dataclasses.asdict(row))
        print(lines(report["rows"][-1]), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    add(Row(section="machine", case=DTYPE, values=measure_machine(DTYPE)))
    for seq_len in options.seq_lens:
        for name, values in measure_mixtures(seq_len, options.turns).items():
            add(Row(section="mixtures", case=f"T = {seq_len}, {name}", values=values))
    if options.copies:
        values = measure_preparation(options.copies, PREPARATION_TURNS)
        add(Row(section="preparation", values=values))


if __name__ == "__main__":
    main()
