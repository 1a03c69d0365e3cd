"""Texts to a tokenizer: `python -m stackjax.tokenizer INPUT... --vocab-size 32768`."""

from stackjax.data.tokenizer_config import TokenizerConfig
from stackjax.runtime.command_line import parse, program
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(TokenizerConfig, prog=program("tokenizer"))
        from stackjax.data.train_tokenizer import write_tokenizer

        print(write_tokenizer(options))


if __name__ == "__main__":
    main()
