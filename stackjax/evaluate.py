"""Evaluation on lm-evaluation-harness tasks: `python -m stackjax.evaluate MODEL`.

Runs by default the eight tasks reported in arXiv:2405.15319, prints the scores next to the
paper's, and writes all metrics to results.json. As in the paper, accuracy is the harness's
`acc` (not normalized by answer length), and Wikitext perplexity is per word.
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
    """Evaluates a model on lm-evaluation-harness tasks."""

    model: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run or a directory of checkpoints (the newest is used), a checkpoint, or a Hugging
    Face folder."""
    tasks: str = ",".join(PAPER_TASKS)
    """Task or group names, separated by commas."""
    task_dir: Path | None = None
    """Directory with additional lm-evaluation-harness tasks (YAML files)."""
    tokenizer: Text | None = None
    """`bytes`, a file or a folder; by default the model's own tokenizer."""
    num_fewshot: Count | None = None
    """Solved examples before each question; by default as each task says."""
    limit: Tokens | None = None
    """Use only this many documents per task; by default all."""
    batch_size: Size = 32
    """Texts per batch."""
    output: Path = Path("results.json")
    """New JSON file for the results."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Returns a model's scores, with the settings and versions needed to reproduce the run.

    Raises:
      UserError: The model or a task does not exist, or a field is out of range.
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
    # Fixed now, because stdout is redirected while the harness runs.
    console = rich.console.Console(file=sys.stdout)
    return {
        "model": config.model,
        "checkpoint": pretrained.path,
        # Unknown for some imported models.
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
    """Raises UserError if the output file exists or cannot be written."""
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
