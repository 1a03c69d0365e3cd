"""Training of a model that grows.

    python -m stackjax.train --config configs/tiny.py

The same command again resumes the run.
"""

import sys

from stackjax.config_file import load_command
from stackjax.options import TrainOptions
from stackjax.runtime.command_line import program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main(owns_process: bool = False) -> None:
    """Runs the command line.

    Args:
      owns_process: No other code runs in the process, so exits need not wait for the compiler.
    """
    with one_line_errors():
        config, options = load_command(program("train"), sys.argv[1:], TrainOptions())
    from stackjax.run.train import run_command

    silence_absl()
    run_command(config, options, owns_process)


if __name__ == "__main__":
    main(owns_process=True)
