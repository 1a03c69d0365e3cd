"""Growth timing (arXiv:2405.15319, figure 8), on a CPU: isoflop_tiny.py at half the width.

    python -m scripts.sweep configs/isoflop_tiny_narrow.py --jobs 2 --seeds 0 1 \\
      --tokens 25e3 50e3 100e3 200e3 400e3 800e3 --growths 'stack(4)'
"""

import isoflop_tiny

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run with stacking by 4 after a fifth of the bytes."""
    return isoflop_tiny.isoflop_run(32, "runs/isoflop_tiny_narrow")
