"""Stacking in nanochat, 6 to 12 layers, and its deviations from arXiv:2405.15319, on a CPU.

    python -m stackjax.train --config configs/recipes/nanochat_stack_tiny.py
    python -m scripts.bakeoff configs/recipes/nanochat_stack_tiny.py --jobs 2 --seeds 1

The first command trains the replication with the latest growth, in about three minutes on two
cores. The second trains the five timings, each switch turned alone, all four turned, and scratch
for each optimizer and schedule.

As in the source: depths, the budget of 10.5 tokens per parameter, five timings, Muon, reset
optimizer state, schedules. Different: 32 channels, bytes as tokens; all that nanochat_stack_d12.py
lists.
"""

from parts import nanochat_stack, sizes

from stackjax.config import Config

SCRATCH = sizes.tiny("nanochat_stack_tiny", embed_dim=32)
MUON = 4e-3


def get_config() -> Config:
    """Returns the replication with the latest growth."""
    timing = nanochat_stack.TIMINGS[-1]
    return nanochat_stack.grown(SCRATCH, nanochat_stack.Setting(), timing, muon=MUON)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return nanochat_stack.runs(SCRATCH, muon=MUON, seed=seed)
