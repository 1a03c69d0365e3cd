"""Scaling laws of grown runs and of runs from scratch.

    python -m stackjax.scale runs/scratch_* runs/gstack_*

With three or more model sizes the command fits L = a C^b and extrapolates the speed-up to
more compute (arXiv:2405.15319, figure 7). With one size and several lengths it fits the gap in
loss over tokens (figure 6). The end of each run is a point. The command writes a table, a JSON
file, figures and an HTML page.
"""

from stackjax.options import ScaleConfig
from stackjax.runtime.command_line import parse, program
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(ScaleConfig, prog=program("scale"))
        from stackjax.analysis.scaling_report import write

        print(write(options))


if __name__ == "__main__":
    main()
