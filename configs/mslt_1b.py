"""Multi-stage layerwise training at 1.1B (MSLT, arXiv:2011.13635): old layers are frozen.

    python -m stackjax.train --config configs/mslt_1b.py

Stages with only the new layers train on 10 billion tokens each; the last stage trains all layers.
"""

import dataclasses

import gradual_1b

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    config = gradual_1b.get_config()
    base, second, last = config.stages
    new = dataclasses.replace(second, train_layers="new")
    stages = (base, new, new, dataclasses.replace(last, growth=None))
    return dataclasses.replace(config, stages=stages, workdir="runs/mslt_1b")
