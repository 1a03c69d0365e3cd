"""Shared code for comparisons over several sizes: a grown run and a run from scratch per size.

The configs are for `python -m scripts.scale configs/NAME.py`.
"""

import dataclasses

import tiny
from common import bakeoff

from stackjax.config import Config, EvaluationConfig, Schedule
from stackjax.growth import Stack
from stackjax.model import ModelConfig
from stackjax.model.flops import flops_6nd

HEAD_DIM = 16


def model_of(width: int) -> ModelConfig:
    """Returns a model with 8 layers; the width must be a multiple of 16."""
    return ModelConfig(
        vocab_size=256,
        num_layers=8,
        embed_dim=width,
        mlp_dim=width * 11 // 4,
        num_heads=width // HEAD_DIM,
        num_kv_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
    )


def grown_run(model: ModelConfig, *, small_tokens: int, tokens: int, workdir: str) -> Config:
    """Returns a run with a quarter of the layers, then stacking.

    The small model keeps its peak learning rate, so it does not depend on the growth timing.

    Args:
      tokens: Tokens of the target.
    """
    config = tiny.get_config()
    base = dataclasses.replace(
        config.stages[0],
        tokens=small_tokens,
        schedule=Schedule(shape="constant", warmup_tokens=small_tokens // 4),
    )
    warmup = min(60_000, tokens // 16)
    last = dataclasses.replace(
        base, tokens=tokens, growth=Stack(4), schedule=Schedule(warmup_tokens=warmup)
    )
    return dataclasses.replace(
        config,
        model=model,
        stages=(base, last),
        evaluation=EvaluationConfig(
            every_tokens=max(tokens // 8, 25_000), num_sequences=256, batch_size=64
        ),
        workdir=workdir,
    )


def pair(grown: Config, tokens: int, seed: int) -> dict[str, Config]:
    """Returns a grown run and a run from scratch, for the FLOPs of `tokens` from scratch."""
    flops = flops_6nd(grown.model) * tokens
    timings = {"d": grown.stages[0].tokens or 0}
    name = grown.workdir.rsplit("/", 1)[-1]
    runs = bakeoff.runs(grown, {"stack": "stack(4)"}, timings=timings, flops=flops, seed=seed)
    return {f"{kind}, {name}": config for kind, config in runs.items()}
