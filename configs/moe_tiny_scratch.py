"""The target of moe_tiny.py from scratch, with the same FLOPs (6ND of active parameters).

python -m stackjax.train --config configs/moe_tiny_scratch.py
"""

import dataclasses

import moe_tiny

from stackjax.analysis.budget import scratch_tokens
from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    grown = moe_tiny.get_config()
    stage = dataclasses.replace(grown.stages[-1], tokens=scratch_tokens(grown), growth=None)
    return dataclasses.replace(grown, stages=(stage,), workdir="runs/moe_tiny_scratch")
