"""Growth outside of a run: `python -m stackjax.grow SOURCE TARGET --growth 'stack(4)'`."""

import sys

from stackjax.config_file import config_argument, read_config
from stackjax.options import GrowConfig
from stackjax.runtime.command_line import parse, program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        config, _ = config_argument(sys.argv[1:])
        if config is not None:
            read_config(config)  # registers growth operators
        options = parse(GrowConfig, prog=program("grow"))
        from stackjax.run.grow import grow

        silence_absl()
        grow(options)


if __name__ == "__main__":
    main()
