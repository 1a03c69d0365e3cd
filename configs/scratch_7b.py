"""The target of gstack_7b.py from scratch, for the total FLOPs (6ND) of the grown run.

python -m stackjax.train --config configs/scratch_7b.py
"""

import gstack_7b
from common.paper import scratch

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return scratch("7b", gstack_7b.get_config())
