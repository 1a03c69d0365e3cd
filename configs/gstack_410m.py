"""G_stack at 410M (arXiv:2405.15319): 6 layers for 10B tokens, then 24 for 750B.

    python -m stackjax.train --config configs/gstack_410m.py

on GPU hosts or a TPU slice; the same command on every host. 0.374B parameters in all.
The paper's gain shrinks from 53 % at 400B tokens to 31 % at 700B.
"""

import dataclasses

from common.paper import SCHEDULE, gstack, model_config

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return gstack(
        "410m",
        model_config(
            num_layers=24,
            embed_dim=1024,
            mlp_dim=2816,
            num_heads=16,
            num_kv_heads=16,
        ),
        tokens=750_000_000_000,
        base_peak_learning_rate=1e-3,  # ours; the paper gives the target's only
        peak_learning_rate=6e-4,
        accumulate=8,
        # Ours: the released horizon of 629B tokens would end before the run does.
        schedule=dataclasses.replace(SCHEDULE, horizon_tokens=750_000_000_000),
    )
