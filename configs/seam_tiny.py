"""Optimizer state and learning rate after growth, on a CPU, for the table in docs/growth.md.

    python -m scripts.bakeoff configs/seam_tiny.py --jobs 2 --seeds 1

trains with stacking and with an uneven split, for the FLOPs of 400,000 bytes from scratch. The small
model sees half of these bytes; other settings are from bakeoff_tiny.py.
"""

import dataclasses

import bakeoff_tiny
from common import bakeoff

from stackjax.config import Config, Rewarm, Schedule
from stackjax.model.flops import flops_6nd

TOKENS = 400_000
GROWTHS = {
    "stack": "stack(4)",
    "split": "width_split(embed=2, mlp=2, heads=2, split=uneven)",
}
CONTINUE = {"schedule": Schedule(warmup_tokens=40_000, axis="run")}
SEAMS = {
    **{(state, "restart"): {} for state in ("reset", "grow", "keep")},
    **{(state, "continue"): CONTINUE for state in ("reset", "grow", "keep")},
    ("keep", "rewarm new"): CONTINUE | {"rewarm": Rewarm(tokens=40_000)},
    ("grow", "by fan-in"): {"scale_by_fan_in": True},
}


def get_config() -> Config:
    """Returns the run with stacking and default growth settings."""
    return dataclasses.replace(bakeoff_tiny.get_config(), workdir="runs/seam_tiny")


def get_runs(seed: int) -> dict[str, Config]:
    """Returns a run for every combination."""
    config = get_config()
    base, last = config.stages
    flops = flops_6nd(config.model) * TOKENS
    found = {"scratch": bakeoff.scratch_run(config, flops=flops, seed=seed)}
    for growth, text in GROWTHS.items():
        for (state, rate), fields in SEAMS.items():
            if growth == "stack" and rate == "by fan-in":
                continue  # stacking keeps every fan-in
            stage = dataclasses.replace(last, optimizer_state=state, **fields)
            found |= bakeoff.grown_runs(
                dataclasses.replace(config, stages=(base, stage)),
                {f"{growth}, {state}, {rate}": text},
                timings={"d": TOKENS // 2},
                flops=flops,
                seed=seed,
            )
    return found
