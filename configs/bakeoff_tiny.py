"""The operators in figure 3 (arXiv:2405.15319) on a CPU: 8 layers x 64 channels.

    python -m scripts.bakeoff configs/bakeoff_tiny.py --jobs 2

trains all eight operators at two growth timings, and the target from scratch, in less than an hour
on two cores. Every run has the FLOPs of 1M bytes from scratch. A single operator:

    python -m stackjax.train --config configs/bakeoff_tiny.py --stages.1.growth 'depth_zero(factor=4)'

As in the paper, the small model sees a tenth (d) or half (5d) of these bytes, grows at its peak
learning rate, and the target warms up again. Masks open over a tenth; a fit takes 25 of about 490
steps.
"""

import dataclasses

import tiny
from common import bakeoff

from stackjax.config import Config, EvaluationConfig, Schedule
from stackjax.growth import Stack
from stackjax.model.flops import flops_6nd

TOKENS = 1_000_000


def get_config() -> Config:
    """Returns the run with stacking."""
    config = tiny.get_config()
    model = dataclasses.replace(
        config.model, num_layers=8, num_heads=4, num_kv_heads=4, head_dim=16
    )
    warmup = 60_000
    base = dataclasses.replace(
        config.stages[0],
        tokens=TOKENS // 10,
        schedule=Schedule(shape="constant", warmup_tokens=warmup),
    )
    last = dataclasses.replace(
        base, tokens=TOKENS, growth=Stack(4), schedule=Schedule(warmup_tokens=warmup)
    )
    return dataclasses.replace(
        config,
        model=model,
        stages=(base, last),
        evaluation=EvaluationConfig(every_tokens=100_000, num_sequences=512, batch_size=64),
        workdir="runs/bakeoff_tiny",
    )


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    config = get_config()
    return bakeoff.runs(
        config,
        bakeoff.operators(mask_tokens=TOKENS // 10, fit_steps=25),
        timings={"d": TOKENS // 10, "5d": TOKENS // 2},
        flops=flops_6nd(config.model) * TOKENS,
        seed=seed,
    )
