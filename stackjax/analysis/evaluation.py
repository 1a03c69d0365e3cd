"""Scores on lm-evaluation-harness tasks, printed and written to a file."""

import importlib.metadata
import sys
from typing import Any

import rich.console

from stackjax.analysis.scores import tell
from stackjax.checkpoint.lineage import code_version, total
from stackjax.files.output import check_new_file, write_json
from stackjax.inference.pretrained import load_saved
from stackjax.inference.saved_model import open_model
from stackjax.inference.tasks import load_tasks, measure
from stackjax.options import EvaluateConfig
from stackjax.runtime.errors import UserError


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Returns a model's scores, with the settings and versions needed to reproduce the run.

    Raises:
      UserError: The model or a task does not exist, or a field is out of range.
      OSError: A file could not be read.
    """
    check_new_file("output", config.output)
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
    saved = open_model(config.model)
    pretrained = load_saved(saved, config.tokenizer)
    # Fixed now, because stdout is redirected while the harness runs.
    console = rich.console.Console(file=sys.stdout)
    return {
        "model": config.model,
        "checkpoint": str(saved.path),
        # Unknown for some imported models.
        "tokens": total(saved.contents.lineage).tokens or None,
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


def write(config: EvaluateConfig) -> None:
    """Prints the scores and writes all results to a JSON file; raises as `evaluate` does."""
    results = evaluate(config)
    print(tell(results))
    write_json(config.output, results)
    print(f"{config.output}: all of this, with standard errors")
