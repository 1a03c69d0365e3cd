"""The console command: `stackjax train --config configs/tiny.py`, or `python -m stackjax`."""

import importlib
import sys

COMMANDS = {
    "train": "train a model that grows",
    "grow": "grow a checkpoint or a Hugging Face folder",
    "tokenizer": "train a tokenizer on text",
    "prepare": "convert text to token shards",
    "data": "show a data set, or the data that a run reads",
    "convert": "convert to and from Hugging Face folders",
    "generate": "generate text",
    "evaluate": "score a model on tasks of lm-evaluation-harness",
    "inspect": "show the lineage of a checkpoint",
    "plan": "plan when to grow, with cost and savings",
    "fit": "compile every program of a run for devices that are not there",
    "compare": "compare grown runs with runs from scratch",
    "isoflop": "find the best timing and factor of growth",
    "scale": "fit scaling laws to runs",
}


def main() -> None:
    """Runs the command that the first argument names."""
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name in COMMANDS:
        sys.argv = [f"stackjax {name}", *args]
        run = importlib.import_module(module_of(name)).main
        run(owns_process=True) if name == "train" else run()
    else:
        print(f"error: {name!r} is not a command; see `stackjax --help`.", file=sys.stderr)
        sys.exit(2)


def module_of(name: str) -> str:
    """Returns the module of a command; `tokenizer` and `data` are also packages."""
    is_package = name in ("tokenizer", "data")
    return f"stackjax.{name}.__main__" if is_package else f"stackjax.{name}"


def usage() -> str:
    """Returns the help page: every command in a line."""
    lines = [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: stackjax COMMAND [OPTIONS]",
            "",
            "Pretraining of language models that grow while they train.",
            "",
            *lines,
            "",
            "`stackjax COMMAND --help` shows the options of a command.",
        ]
    )


if __name__ == "__main__":
    main()
