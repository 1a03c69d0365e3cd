"""Text to token shards: `python -m stackjax.prepare INPUT... OUTPUT --tokenizer bytes`."""

from stackjax.data.config import PrepareConfig
from stackjax.runtime.command_line import parse, program
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(PrepareConfig, prog=program("prepare"))
        from stackjax.data.prepare import prepare

        for name, split in prepare(options).splits.items():
            repeated = f" ({split.duplicates} duplicates)" if split.duplicates else ""
            print(f"{name}: {split.tokens} tokens in {split.documents} documents{repeated}")


if __name__ == "__main__":
    main()
