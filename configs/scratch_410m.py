"""The target of gstack_410m.py from scratch, for the total FLOPs (6ND) of the grown run.

python -m stackjax.train --config configs/scratch_410m.py
"""

import gstack_410m
from common.paper import scratch

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return scratch("410m", gstack_410m.get_config())
