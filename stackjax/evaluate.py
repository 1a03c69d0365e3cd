"""How well a model does on tasks of lm-evaluation-harness.

    python -m stackjax.evaluate RUN

runs the eight that arXiv:2405.15319 reports, prints the scores beside those that it printed,
and writes all that was measured to results.json. As there, accuracy is the harness's `acc`,
not normalised by the length of an answer, and Wikitext's perplexity is that of a word.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import absl.logging
import rich.console
import tyro

from stackjax.analysis.scores import PAPER_TASKS, tell
from stackjax.errors import one_line_errors
from stackjax.lineage import code_version, total
from stackjax.pretrained import Pretrained, load_pretrained

_DRAWS = 1000
"""Resamplings behind a standard error that has no formula."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures how well a model does on tasks of lm-evaluation-harness."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, a directory of checkpoints, one of them, or a folder of transformers."""
    tasks: str = ",".join(PAPER_TASKS)
    """Names of tasks or groups of them, separated by commas."""
    task_dir: Path | None = None
    """Directory of further tasks, as YAML files of lm-evaluation-harness."""
    tokenizer: str | None = None
    """The tokenizer, where the model does not come with it: `bytes`, or a file."""
    num_fewshot: int | None = None
    """Solved examples before each question; by default as many as each task has."""
    limit: int | None = None
    """Documents of each task, the first ones; by default all."""
    batch_size: int = 32
    """Texts that are scored together."""
    output: Path = Path("results.json")
    """JSON file to write."""


def evaluate(
    config: EvaluateConfig, pretrained: Pretrained, index: Any, names: Sequence[str]
) -> dict[str, Any]:
    """Returns what a model scores on tasks, and what it takes to measure it again.

    Args:
      index: What `find_tasks` returns, as are the names.
    """
    from lm_eval.evaluator import simple_evaluate

    from stackjax.interop.harness import StackjaxLM

    # The bar stays on the terminal, whatever else is written there.
    console = rich.console.Console(file=sys.stdout)
    tasks = [task for name in names for task in _load(index, name)]
    model: Any = StackjaxLM(pretrained, config.batch_size, console)
    with _quiet():
        found: Any = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=index,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            bootstrap_iters=_DRAWS,
            log_samples=False,
        )
    return {
        "model": config.model,
        # Where it comes from may not be known as far back as to its first token.
        "checkpoint": pretrained.path,
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
        "tasks": {
            name: {
                "version": found["versions"].get(name),
                "num_fewshot": found["n-shot"].get(name),
                "num_documents": found["n-samples"].get(name, {}).get("effective"),
                "metrics": _metrics(metrics),
            }
            for name, metrics in found["results"].items()
        },
    }


def _metrics(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns metrics and their standard errors, where these are known."""
    metrics = {}
    for key, value in found.items():
        name, comma, filter_name = key.partition(",")
        if comma:
            name = name if filter_name == "none" else f"{name} ({filter_name})"
            # Instead of a standard error that it does not know, it says N/A.
            metrics[name] = None if isinstance(value, str) else float(value)
    return metrics


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the harness and the libraries under it tell of their work."""
    # A fork of a process that runs JAX may hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    told = io.StringIO()
    # Handlers of logs keep the terminal that they have begun with.
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            yield
    finally:
        logging.disable(logging.NOTSET)


def find_tasks(config: EvaluateConfig) -> tuple[Any, list[str]]:
    """Returns the harness's index of tasks, and the names of those to be run, which it has.

    Raises:
      ValueError: The harness is not installed, there is no such task or directory, or a
        number is out of range.
    """
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lm-evaluation-harness cannot be imported ({error}); "
            f"pip install -r requirements-interop.txt"
        ) from error
    _check(config)
    with _quiet():
        index = TaskManager(include_path=config.task_dir)
    names = list(dict.fromkeys(name.strip() for name in config.tasks.split(",")))
    for name in names:
        if name not in index.all_tasks:
            near = difflib.get_close_matches(name, index.all_tasks)
            raise ValueError(
                f"there is no task {name!r} in lm_eval or in --task-dir"
                f"{'; near it are ' + ', '.join(near) if near else ''}."
            )
    return index, names


def _check(config: EvaluateConfig) -> None:
    for name, least in {"limit": 1, "num_fewshot": 0, "batch_size": 1}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    if config.task_dir is not None and not config.task_dir.is_dir():
        raise ValueError(f"task_dir {config.task_dir} is not a directory of YAML files.")
    if not config.output.absolute().parent.is_dir():
        raise ValueError(
            f"output is {config.output}, but there is no directory "
            f"{config.output.absolute().parent}; make it first."
        )


def _load(index: Any, name: str) -> list[Any]:
    """Returns a task or group with its data, or every task of a tag.

    Raises:
      ValueError: Data can neither be downloaded nor read.
    """
    print(f"loading {name}", flush=True)
    try:
        with _quiet():
            loaded = index.load([name])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the data of task {name!r} cannot be loaded: {error}. Those of the harness's own "
            f"tasks come from Hugging Face's Hub: load them once where it is reached (they are "
            f"kept in HF_HOME), or leave the task out of --tasks."
        ) from error
    group = loaded.get("groups", {}).get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def main() -> None:
    """Runs the command line."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    with one_line_errors():
        prog = "python -m stackjax.evaluate"
        config = tyro.cli(EvaluateConfig, prog=prog, args=sys.argv[1:])
        index, names = find_tasks(config)
        pretrained = load_pretrained(config.model, config.tokenizer)
        results = evaluate(config, pretrained, index, names)
        print(tell(results))
        config.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{config.output}: all of this, with standard errors")


if __name__ == "__main__":
    main()
