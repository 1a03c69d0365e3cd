"""The target of gstack_1b.py from scratch, for the total FLOPs (6ND) of the grown run.

python -m stackjax.train --config configs/scratch_1b.py
"""

import gstack_1b
from common.paper import scratch

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return scratch("1b", gstack_1b.get_config())
