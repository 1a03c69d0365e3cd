"""Training of a model that grows.

    python -m stackjax.train --config configs/tiny.py

The same command again resumes the run.
"""

import sys

from stackjax.config_file import load_command
from stackjax.options import ResumeConfig
from stackjax.runtime.command_line import program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        config, options = load_command(program("train"), sys.argv[1:], ResumeConfig())
    from stackjax.run.train import run_command

    silence_absl()
    run_command(config, options)


if __name__ == "__main__":
    main()
