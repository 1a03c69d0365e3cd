"""Runs with equal FLOPs."""

import dataclasses
import math
import re

from stackjax.config import Config
from stackjax.model.flops import flops_6nd
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand

_ENDLESS = 10**15
"""Placeholder for the last stage's length, beyond any real length."""


def scratch_tokens(config: Config) -> int:
    """Returns the tokens from scratch for the grown run's total FLOPs (6ND)."""
    phases = expand(config)
    return math.ceil(phases[-1].end.flops_6nd / flops_6nd(phases[-1].model))


def for_flops(config: Config, flops: float) -> Config:
    """Returns the run with the last stage cut to a total budget in FLOPs (6ND).

    The length is rounded down to whole steps.

    Raises:
      UserError: The budget leaves no step for the last stage, or another stage's length is a
        fraction.
    """
    *before, stage = config.stages
    if any(each.fraction is not None for each in before):
        raise UserError(
            "stages before the last have a `fraction`, but the total length depends on the "
            "budget; give them `tokens`."
        )
    endless = dataclasses.replace(stage, tokens=_ENDLESS, fraction=None)
    phases = expand(dataclasses.replace(config, stages=(*before, endless)))
    last, first = phases[-1], next(p for p in phases if p.stage == phases[-1].stage)
    steps = int((flops - last.start.flops_6nd) // last.per_step.flops_6nd)
    if steps < 1:
        raise UserError(
            f"the budget is {flops:.3g} FLOPs (6ND), but the earlier stages cost "
            f"{last.start.flops_6nd:.3g} and a step of the final model costs "
            f"{last.per_step.flops_6nd:.3g}; grow earlier, or increase the budget."
        )
    tokens = last.start.tokens - first.start.tokens + steps * last.per_step.tokens
    return dataclasses.replace(
        config, stages=(*before, dataclasses.replace(endless, tokens=tokens))
    )


def cell(config: Config, name: str, *, flops: float, seed: int) -> Config:
    """Returns a run for a comparison: cut to a budget, with a named directory.

    Raises:
      UserError: The budget is too small.
    """
    words = name.replace(", ", "-").replace(" ", "_").replace("*", "x")
    slug = re.sub(r"[^\w.,=()+-]", "_", words)  # embed=3/2 has a slash
    run = dataclasses.replace(config, seed=seed, workdir=f"{config.workdir}/{slug}-seed_{seed}")
    try:
        return for_flops(run, flops)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
