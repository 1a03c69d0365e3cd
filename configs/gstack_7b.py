"""G_stack at 7B (arXiv:2405.15319): 8 layers for 10B tokens, then 32 for 300B.

    python -m stackjax.train --config configs/gstack_7b.py

on GPU hosts or a TPU slice; the same command on every host. 5.933B parameters in all.
The paper reaches scratch's loss at 300B tokens after 194B: 54.6 % sooner.
"""

from common.paper import gstack, model_config

from stackjax.config import Config


def get_config() -> Config:
    """Returns the run."""
    return gstack(
        "7b",
        model_config(
            num_layers=32,
            embed_dim=4096,
            mlp_dim=11008,
            num_heads=32,
            num_kv_heads=8,
        ),
        tokens=300_000_000_000,
        base_peak_learning_rate=3e-4,  # ours; the paper gives the target's only
        peak_learning_rate=1e-4,
        accumulate=32,
    )
