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
    """Returns the lineage of a checkpoint or folder; UserError if there is none."""
    saved = open_model(config.run)
    if config.json:
        return json.dumps({"checkpoint": str(saved.path)} | dataclasses.asdict(saved.contents))
    return f"{saved.path}\n{_table(saved.contents)}"


def _table(contents: Contents) -> str:
    """Returns a line per generation, oldest first."""
    head = ("stage", "growth", "params", "tokens", "6ND FLOPs", "FLOPs", "code", "model")
    sums = ("total", "", "", *_spent(total(contents.lineage)), "", "")
    table = aligned([head, *map(_cells, contents.lineage), sums])
    if contents.is_model:
        return table
    return f"{table}\ngrowth is incomplete: a fit is running, or masks are opening"


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


def _spent(counts: Counts) -> tuple[str, str, str]:
    return short(counts.tokens), f"{counts.flops_6nd:.3e}", f"{counts.flops:.3e}"
