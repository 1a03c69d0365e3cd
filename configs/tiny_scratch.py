"""The target of tiny.py from scratch, for the FLOPs of the whole grown run (6ND).

    python -m stackjax.train --config configs/tiny_scratch.py

@@LR@@
"""

import dataclasses

import tiny

from stackjax.config import Config
from stackjax.phases import scratch_tokens


def get_config() -> Config:
    """Returns the run."""
    grown = tiny.get_config()
    stage = dataclasses.replace(grown.stages[-1], tokens=scratch_tokens(grown), growth=None)
    return dataclasses.replace(grown, stages=(stage,), workdir="runs/tiny_scratch")
