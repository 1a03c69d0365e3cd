"""Lineage of a checkpoint, with tokens and FLOPs: `python -m stackjax.inspect RUN`."""

from stackjax.options import InspectConfig
from stackjax.runtime.command_line import parse, program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(InspectConfig, prog=program("inspect"))
        from stackjax.inference.lineage_table import inspect

        silence_absl()
        print(inspect(options))


if __name__ == "__main__":
    main()
