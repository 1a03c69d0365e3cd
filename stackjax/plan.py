"""Timing, cost and expected savings of growth with G_stack (arXiv:2405.15319).

    python -m stackjax.plan --params 7e9 --tokens 2e12 --write gstack.py

The command prints a plan, and writes a config file.
"""

from stackjax.options import PlanConfig
from stackjax.runtime.command_line import parse, program
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(PlanConfig, prog=program("plan"))
        from stackjax.analysis.plan import write

        write(options)


if __name__ == "__main__":
    main()
