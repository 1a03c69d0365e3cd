"""Task-score tables, with published scores."""

from collections.abc import Mapping
from typing import Any

from stackjax.analysis.published import PUBLISHED_SCORES, PublishedScores
from stackjax.options import ACCURACY_TASKS, PAPER_TASKS, WIKITEXT
from stackjax.runtime.numbers import short
from stackjax.runtime.text_table import aligned

_HEAD = ("Lambada", "ARC-c", "ARC-e", "LogiQA", "PIQA", "SciQ", "Winogrande")


def tell(results: Mapping[str, Any]) -> str:
    """Returns a table for the paper's tasks, with published scores, and for other tasks."""
    tasks = results["tasks"]
    parts = []
    if any(name in tasks for name in PAPER_TASKS):
        parts.append(_beside_published(results))
    others = [
        (name, str(task["num_fewshot"]), metric, *_with_error(task["metrics"], metric))
        for name, task in tasks.items()
        if name not in PAPER_TASKS
        for metric in task["metrics"]
        if "_stderr" not in metric
    ]
    if others:
        head = ("task", "shots", "metric", "value", "standard error")
        parts.append(aligned([head, *others]))
    if results["limit"] is not None:
        parts.append(f"limited to the first {results['limit']} documents of each task")
    return "\n\n".join(parts)


def _with_error(metrics: Mapping[str, float | None], metric: str) -> tuple[str, str]:
    name, space, filter_name = metric.partition(" ")
    error = metrics.get(f"{name}_stderr{space}{filter_name}")
    return _number(metrics[metric], 4), _number(error, 4)


def _beside_published(results: Mapping[str, Any]) -> str:
    metrics = {name: task["metrics"] for name, task in results["tasks"].items()}
    accuracies = {
        name: 100 * metrics[name]["acc"] for name in ACCURACY_TASKS if name in metrics
    }
    average = None
    if len(accuracies) == len(ACCURACY_TASKS):
        average = sum(accuracies.values()) / len(accuracies)
    tokens = results["tokens"]
    ours = _cells(
        results["model"],
        "-" if tokens is None else short(tokens),
        accuracies,
        average,
        metrics.get(WIKITEXT, {}).get("word_perplexity"),
        "",
    )
    head = ("model", "trained", *_HEAD, "average", "Wikitext", "arXiv:2405.15319")
    return aligned([head, ours, *map(_published_cells, PUBLISHED_SCORES)])


def _published_cells(row: PublishedScores) -> tuple[str, ...]:
    return _cells(row.name, row.trained, row.accuracies, row.average, row.wikitext, row.where)


def _cells(
    name: str,
    trained: str,
    accuracies: Mapping[str, float],
    average: float | None,
    wikitext: float | None,
    where: str,
) -> tuple[str, ...]:
    numbers = [*(accuracies.get(task) for task in ACCURACY_TASKS), average, wikitext]
    return (name, trained, *(_number(number, 2) for number in numbers), where)


def _number(number: float | None, decimals: int) -> str:
    return "-" if number is None else f"{number:.{decimals}f}"
