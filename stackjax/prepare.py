"""Converts text to token shards.

python -m stackjax.prepare INPUT... OUTPUT --tokenizer bytes
"""

from stackjax.data.prepare import PrepareConfig, prepare
from stackjax.runtime.command_line import parse
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command; user errors print one line and exit with code 2."""
    with one_line_errors():
        config = parse(PrepareConfig, prog="python -m stackjax.prepare")
        manifest = prepare(config)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.tokens} tokens in {split.documents} documents")


if __name__ == "__main__":
    main()
