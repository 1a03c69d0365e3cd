"""G_stack at 3B (arXiv:2405.15319): 8 layers for 10B tokens, then 32 for 300B.

    python -m stackjax.train --config configs/gstack_3b.py

on GPU hosts or a TPU slice; the same command on every host. 2.397B parameters in all.
The paper is 48.6 % ahead of scratch at 180B tokens and 54.5 % at 240B.
"""

from common.paper import gstack, model_config

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return gstack(
        "3b",
        model_config(
            num_layers=32,
            embed_dim=2560,
            mlp_dim=7040,
            num_heads=20,
            num_kv_heads=4,
        ),
        tokens=300_000_000_000,
        base_peak_learning_rate=5e-4,  # ours; the paper gives the target's only
        peak_learning_rate=1.6e-4,
        accumulate=16,
    )
