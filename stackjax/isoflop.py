"""The best timing and factor of growth at equal FLOPs, measured by your own runs.

    python -m stackjax.isoflop runs/sweep/*-seed_*

The command fits parabolas over the timing d and the factor g for each model size and budget.
From enough optima it fits the timing law of arXiv:2405.15319 again. It writes a table, a JSON
file, figures and an HTML page.
"""

from stackjax.options import IsoflopConfig
from stackjax.runtime.command_line import parse, program
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(IsoflopConfig, prog=program("isoflop"))
        from stackjax.analysis.isoflop_report import write

        print(write(options))


if __name__ == "__main__":
    main()
