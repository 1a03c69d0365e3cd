"""The target of moe_tiny.py from scratch, with the same FLOPs (6ND of active parameters).

python -m stackjax.train --config configs/moe_tiny_scratch.py
"""

import moe_tiny
from common import scratch

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return scratch.of(moe_tiny.get_config(), "runs/moe_tiny_scratch")
