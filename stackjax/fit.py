"""Memory, communication and bounds of every program of a run, on devices that are not present.

    python -m stackjax.fit --config configs/gstack_1b.py --devices h100:8

The command compiles the train step, growth and evaluation of each stage. Exit code 2 means that
a program does not fit, or that the config does not work on these devices.
"""

import sys

from stackjax.accelerators.environment import expect_no_devices
from stackjax.config_file import config_argument, load_command
from stackjax.options import FitConfig
from stackjax.runtime.command_line import program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        expect_no_devices()
        config, options = load_command(program("fit"), sys.argv[1:], FitConfig())
        from stackjax.accelerators.fit import fit

        silence_absl()
        path, _ = config_argument(sys.argv[1:])
        assert path is not None, "the config was loaded"
        fit(config, options, path)


if __name__ == "__main__":
    main()
