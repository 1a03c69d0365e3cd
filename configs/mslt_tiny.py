"""Multi-stage layerwise training on a CPU (MSLT, arXiv:2011.13635): old layers are frozen.

    python -m stackjax.train --config configs/mslt_tiny.py

6 layers train, then the upper 6 of 12, then the upper 12 of 24 (with head and final norm), then all
24. Frozen layers below the first trained layer only run forward, and cost only forward FLOPs.
"""

import dataclasses

import gradual_tiny

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    config = gradual_tiny.get_config()
    base, second, third = (
        dataclasses.replace(stage, tokens=150_000) for stage in config.stages
    )
    second, third = (
        dataclasses.replace(stage, train_layers="new") for stage in (second, third)
    )
    stages = (base, second, third, base)
    return dataclasses.replace(config, stages=stages, workdir="runs/mslt_tiny")
