"""G_stack of a mixture of experts: 4 layers for 10B tokens, then 16 for 100B.

    python -m stackjax.train --config configs/gstack_moe_1b.py

on GPU hosts or a TPU slice, with the same command on every host. The target has the shape of OLMoE
(arXiv:2409.02060): 64 experts, 8 for each token; 6.9B parameters, 1.3B of them active. Settings
besides the model are those of gstack_1b.py. upcycle_moe_1b.py makes the experts from a dense model.
"""

import dataclasses

import gstack_1b

from stackjax.config import Config
from stackjax.model import ModelConfig
from stackjax.model.routing_config import Routing

ROUTING = Routing(top_k=8, normalize=False, balance_weight=0.01, z_loss=1e-3)
MODEL = ModelConfig(
    vocab_size=50_304,
    num_layers=16,
    embed_dim=2048,
    mlp_dim=8192,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    expert_dim=1024,
    routing=ROUTING,
    qk_norm=True,
    qk_norm_over="all_heads",
)
"""OLMoE's shape."""


def get_config() -> Config:
    """Returns the run."""
    config = gstack_1b.get_config()
    base, last = config.stages
    last = dataclasses.replace(last, tokens=100_000_000_000)
    return dataclasses.replace(
        config, model=MODEL, stages=(base, last), workdir="runs/gstack_moe_1b"
    )
