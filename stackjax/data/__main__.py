"""A data set, or the data that a run reads, in numbers and examples.

python -m stackjax.data data/mine
python -m stackjax.data --config configs/tiny.py
"""

import sys

from stackjax.config_file import config_argument, load_command
from stackjax.data.view_config import DataViewConfig, RunDataConfig
from stackjax.runtime.command_line import parse, program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        path, _ = config_argument(sys.argv[1:])
        if path is None:
            options = parse(DataViewConfig, prog=program("data"))
            from stackjax.analysis.data_report import data_report

            silence_absl()
            print(data_report(options))
        else:
            config, options = load_command(program("data"), sys.argv[1:], RunDataConfig())
            from stackjax.analysis.run_data_report import run_data_report

            silence_absl()
            print(run_data_report(config, options))


if __name__ == "__main__":
    main()
