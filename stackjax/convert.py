"""Conversion to and from Hugging Face folders.

    python -m stackjax.convert SOURCE TARGET

A Hugging Face folder or lit-gpt file becomes a checkpoint; a run or checkpoint becomes a
folder.
"""

from stackjax.options import ConvertConfig
from stackjax.runtime.command_line import parse, program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(ConvertConfig, prog=program("convert"))
        from stackjax.inference.convert import convert

        silence_absl()
        convert(options)


if __name__ == "__main__":
    main()
