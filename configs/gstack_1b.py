"""G_stack at 1.1B (arXiv:2405.15319): 6 layers for 10B tokens, then 24 for 97.5B.

    python -m stackjax.train --config configs/gstack_1b.py

on GPU hosts or a TPU slice; the same command on every host. 1.364B parameters in all.
The paper reaches a training loss of 2.15 at 8e20 FLOPs, 49 % sooner than from scratch.
"""

from common.paper import gstack, model_config

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return gstack(
        "1b",
        model_config(
            num_layers=24,
            embed_dim=2048,
            mlp_dim=5632,
            num_heads=32,
            num_kv_heads=32,
        ),
        tokens=97_500_000_000,
        base_peak_learning_rate=1e-3,  # as released, to 1e-4
        peak_learning_rate=3e-4,
        accumulate=16,
    )
