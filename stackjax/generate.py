"""Text generation: `python -m stackjax.generate MODEL --prompt 'def f('`."""

from stackjax.options import GenerateConfig
from stackjax.runtime.command_line import parse, program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(GenerateConfig, prog=program("generate"))
        from stackjax.inference.continue_prompts import run

        silence_absl()
        run(options)


if __name__ == "__main__":
    main()
