"""The lineage of a checkpoint as a table."""

import dataclasses
import json

from stackjax.checkpoint.contents import Contents
from stackjax.checkpoint.lineage import Generation, total
from stackjax.inference.saved_model import open_model
from stackjax.model.flops import describe, num_params
from stackjax.options import InspectConfig
from stackjax.runtime.numbers import short
from stackjax.runtime.text_table import aligned
from stackjax.training.phase import Counts


def inspect(config: InspectConfig) -> str:
    """Returns what a checkpoint or folder says of itself; UserError if there is none."""
    saved = open_model(config.run)
    if config.json:
        return json.dumps({"checkpoint": str(saved.path)} | dataclasses.asdict(saved.contents))
    return f"{saved.path}\n{tell(saved.contents)}"


def tell(contents: Contents) -> str:
    """Returns the lineage of a checkpoint, a generation a line, from the first to itself."""
    head = ("stage", "growth", "params", "tokens", "6ND FLOPs", "FLOPs", "code", "model")
    lines = [head, *map(_cells, contents.lineage), _sums(total(contents.lineage))]
    table = aligned(lines)
    if contents.is_model:
        return table
    return f"{table}\nits parameters are not yet the model's: a growth is fitted, or masks open"


def _cells(generation: Generation) -> tuple[str, ...]:
    model, spent = generation.model, generation.spent
    return (
        f"{generation.stage} {generation.name}",
        generation.growth or "-",
        short(num_params(model)),
        *_spent(spent),
        generation.code,
        describe(model),
    )


def _sums(counts: Counts) -> tuple[str, ...]:
    return ("total", "", "", *_spent(counts), "", "")


def _spent(counts: Counts) -> tuple[str, str, str]:
    return short(counts.tokens), f"{counts.flops_6nd:.3e}", f"{counts.flops:.3e}"
