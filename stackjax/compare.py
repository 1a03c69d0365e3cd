"""Speed-up of grown runs over runs from scratch, at equal loss.

    python -m stackjax.compare runs/scratch-* runs/gstack-*

Runs with different seeds and otherwise equal settings form a group with confidence intervals.
The command writes a table, a JSON file, figures and an HTML page.
"""

from stackjax.options import CompareConfig
from stackjax.runtime.command_line import parse, program
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(CompareConfig, prog=program("compare"))
        from stackjax.analysis.comparison_report import write

        print(write(options))


if __name__ == "__main__":
    main()
