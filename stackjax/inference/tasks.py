"""Evaluation on lm-evaluation-harness tasks."""

import contextlib
import dataclasses
import difflib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console

from stackjax.inference.pretrained import Pretrained
from stackjax.runtime.errors import UserError

_DRAWS = 1000
"""Bootstrap resamples for standard errors without a formula."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """Loaded tasks and evaluation settings."""

    index: Any
    """The harness's `TaskManager`."""
    loaded: tuple[Any, ...]
    """The harness's task and group objects."""
    num_fewshot: int | None
    """Solved examples before each question; None uses each task's default."""
    limit: int | None
    """Use only the first documents in each task; None uses all."""
    batch_size: int
    """Texts per batch."""


def load_tasks(
    names: Sequence[str],
    directory: Path | None = None,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 32,
) -> Tasks:
    """Returns tasks with their data.

    Args:
      names: Task, group or tag names.
      directory: Directory with additional tasks as YAML files.

    Raises:
      UserError: The harness is not installed, a task or directory does not exist, a number
        is out of range, or data cannot be loaded.
    """
    for name, value, least in (
        ("limit", limit, 1),
        ("num_fewshot", num_fewshot, 0),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}.")
    if directory is not None and not directory.is_dir():
        raise UserError(
            f"task directory {directory} is not a directory; name one with YAML files."
        )
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(
            f"lm-evaluation-harness cannot be imported ({error}); "
            f"pip install -r requirements-interop.txt"
        ) from error
    with _quiet():
        index = TaskManager(include_path=directory)
    for name in names:
        if name not in index.all_tasks:
            near = difflib.get_close_matches(name, index.all_tasks)
            raise UserError(
                f"there is no task {name!r} in lm_eval or in the task directory"
                f"{'; similar: ' + ', '.join(near) if near else ''}."
            )
    return Tasks(
        index=index,
        loaded=tuple(task for name in names for task in _load(index, name)),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
    )


def _load(index: Any, name: str) -> list[Any]:
    """Returns a task or group with data, or every task with a tag.

    Raises:
      UserError: The data cannot be loaded.
    """
    try:
        with _quiet():
            loaded = index.load([name])
    except (OSError, ValueError) as error:
        raise UserError(
            f"the data of task {name!r} cannot be loaded: {error}. The harness's tasks "
            f"come from the Hugging Face Hub: load them once with network access (they are "
            f"cached in HF_HOME), or leave the task out."
        ) from error
    group = loaded.get("groups", {}).get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def measure(
    tasks: Tasks, pretrained: Pretrained, console: rich.console.Console | None = None
) -> dict[str, dict[str, Any]]:
    """Returns scores per task, with task version, few-shot examples and document count.

    Args:
      console: Terminal for the progress bar.
    """
    from lm_eval.evaluator import simple_evaluate

    from stackjax.inference.lm_eval_adapter import StackjaxLM

    model: Any = StackjaxLM(pretrained, tasks.batch_size, console)
    with _quiet():
        found: Any = simple_evaluate(
            model=model,
            tasks=list(tasks.loaded),
            task_manager=tasks.index,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            bootstrap_iters=_DRAWS,
            log_samples=False,
        )
    return {
        name: {
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "num_documents": found["n-samples"].get(name, {}).get("effective"),
            "metrics": _metrics(metrics),
        }
        for name, metrics in found["results"].items()
    }


def _metrics(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns metrics and, if known, standard errors."""
    metrics = {}
    for key, value in found.items():
        name, comma, filter_name = key.partition(",")
        if comma:
            name = name if filter_name == "none" else f"{name} ({filter_name})"
            # The harness writes "N/A" for an unknown standard error.
            metrics[name] = None if isinstance(value, str) else float(value)
    return metrics


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses output and logging by the harness and the libraries below."""
    # Forking a process with JAX loaded may hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    told = io.StringIO()
    # Log handlers keep a reference to the original stdout and stderr.
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            yield
    finally:
        logging.disable(logging.NOTSET)
