"""Runs that cost as many FLOPs as others."""

import dataclasses
import math
import re

from stackjax.config import Config
from stackjax.model.flops import flops_6nd
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand

_ENDLESS = 10**15
"""More tokens than a stage can need whose length is not settled yet."""


def scratch_tokens(config: Config) -> int:
    """Returns the tokens that train the last model from scratch for the FLOPs of the run.

    FLOPs by 6ND; all stages are charged, so this is where the two break even.
    """
    phases = expand(config)
    return math.ceil(phases[-1].end.flops_6nd / flops_6nd(phases[-1].model))


def for_flops(config: Config, flops: float) -> Config:
    """Returns a run whose last stage is as long as so many FLOPs (6ND) of all stages allow.

    Rounded down to whole steps.

    Raises:
      UserError: Not even one step of the last stage is left, or the length of another
        depends on it.
    """
    *before, stage = config.stages
    if any(each.fraction is not None for each in before):
        raise UserError(
            "a stage before the last has a fraction for its length, which is not settled while "
            "that of the last is not; give it tokens."
        )
    endless = dataclasses.replace(stage, tokens=_ENDLESS, fraction=None)
    phases = expand(dataclasses.replace(config, stages=(*before, endless)))
    last, first = phases[-1], next(p for p in phases if p.stage == phases[-1].stage)
    steps = int((flops - last.start.flops_6nd) // last.per_step.flops_6nd)
    if steps < 1:
        raise UserError(
            f"a run of {flops:.3g} FLOPs (6ND) has spent {last.start.flops_6nd:.3g} before its "
            f"last model trains, of which a step costs {last.per_step.flops_6nd:.3g}; grow "
            f"sooner, or give it more FLOPs."
        )
    tokens = last.start.tokens - first.start.tokens + steps * last.per_step.tokens
    return dataclasses.replace(
        config, stages=(*before, dataclasses.replace(endless, tokens=tokens))
    )


def cell(config: Config, name: str, *, flops: float, seed: int) -> Config:
    """Returns one run of a comparison, for as many FLOPs, in a directory of its name.

    Raises:
      UserError: It does not fit into the FLOPs.
    """
    words = name.replace(", ", "-").replace(" ", "_").replace("*", "x")
    slug = re.sub(r"[^\w.,=()+-]", "_", words)  # embed=3/2 is no directory
    run = dataclasses.replace(config, seed=seed, workdir=f"{config.workdir}/{slug}-seed_{seed}")
    try:
        return for_flops(run, flops)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
