"""How well a model does on tasks of lm-evaluation-harness.

    python -m stackjax.evaluate RUN

runs the eight that arXiv:2405.15319 reports, prints the scores beside those that it printed,
and writes all that was measured to results.json. As there, accuracy is the harness's `acc`,
not normalised by the length of an answer, and Wikitext's perplexity is that of a word.
"""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import absl.logging
import rich.console
import tyro
from etils import epath

from stackjax.analysis.scores import PAPER_TASKS, tell
from stackjax.checkpoint.lineage import code_version, total
from stackjax.files.output import check_writable
from stackjax.files.storage import replace_text
from stackjax.inference.pretrained import load_pretrained
from stackjax.inference.tasks import load_tasks, measure
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Count, Size, Text, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """Measures how well a model does on tasks of lm-evaluation-harness."""

    model: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, a directory of checkpoints, one of them, or a folder of transformers."""
    tasks: str = ",".join(PAPER_TASKS)
    """Names of tasks or groups of them, separated by commas."""
    task_dir: Path | None = None
    """Directory of further tasks, as YAML files of lm-evaluation-harness."""
    tokenizer: Text | None = None
    """`bytes`, a file, or a folder, instead of the model's own tokenizer."""
    num_fewshot: Count | None = None
    """Solved examples before each question; by default as many as each task has."""
    limit: Tokens | None = None
    """Documents of each task, the first ones; by default all."""
    batch_size: Size = 32
    """Texts that are scored together."""
    output: Path = Path("results.json")
    """JSON file to write; it must be new."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Returns what a model scores on tasks, and what it takes to measure it again.

    Raises:
      UserError: There is no such model or task, or a field is out of range.
      OSError: A file could not be read.
    """
    check_output(config.output)
    names = list(dict.fromkeys(name.strip() for name in config.tasks.split(",")))
    if "" in names:
        raise UserError(
            f"tasks is {config.tasks!r}; it must be names, with a comma between two."
        )
    tasks = load_tasks(
        names,
        config.task_dir,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=config.batch_size,
    )
    pretrained = load_pretrained(config.model, config.tokenizer)
    # The bar stays on the terminal, whatever else is written there.
    console = rich.console.Console(file=sys.stdout)
    return {
        "model": config.model,
        "checkpoint": pretrained.path,
        # Not all of them may be known, back to the first.
        "tokens": total(pretrained.lineage).tokens or None,
        "seq_len": pretrained.seq_len,
        "tokenizer": {
            "name": pretrained.tokenizer.name,
            "digest": pretrained.tokenizer.digest,
        },
        "limit": config.limit,
        "versions": {
            "stackjax": code_version(),
            "lm_eval": importlib.metadata.version("lm_eval"),
        },
        "tasks": measure(tasks, pretrained, console),
    }


def check_output(output: Path) -> None:
    """Raises UserError if a new file cannot be written at a path."""
    check_writable("output", output)
    if output.exists() or output.is_symlink():
        raise UserError(f"output {output} exists already; name another file with --output.")


def main() -> None:
    """Runs the command line."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    with one_line_errors():
        prog = "python -m stackjax.evaluate"
        config = parse(EvaluateConfig, prog=prog)
        results = evaluate(config)
        print(tell(results))
        replace_text(epath.Path(config.output), json.dumps(results, indent=1) + "\n")
        print(f"{config.output}: all of this, with standard errors")


if __name__ == "__main__":
    main()
