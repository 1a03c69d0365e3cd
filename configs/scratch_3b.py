"""The target of gstack_3b.py from scratch, for the total FLOPs (6ND) of the grown run.

python -m stackjax.train --config configs/scratch_3b.py
"""

import gstack_3b
from common.paper import scratch

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return scratch("3b", gstack_3b.get_config())
