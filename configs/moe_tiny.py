"""Growth along depth and experts on a CPU: 2 dense layers become 4 layers with 4, then 8 experts.

    python -m stackjax.train --config configs/moe_tiny.py

trains on the bytes of the Python standard library. A token always has one MLP's worth of units: an
expert is half of an MLP, and a token has two experts. moe_tiny_scratch.py is the target from
scratch with the same FLOPs (6ND of active parameters).
"""

import dataclasses

import tiny

from stackjax.config import Config, Stage
from stackjax.growth import ExpertsCopy, Stack, Upcycle, chain
from stackjax.model.routing_config import Routing


def get_config() -> Config:
    """Returns the run."""
    config = tiny.get_config()
    model = dataclasses.replace(
        config.model,
        num_layers=4,
        num_experts=8,
        expert_dim=88,
        routing=Routing(top_k=2, z_loss=1e-3),
    )
    upcycle = chain(Stack(factor=2), Upcycle(experts=4, top_k=2, granularity=2))
    stages = (
        Stage(tokens=400_000, batch_size=16),
        Stage(tokens=400_000, batch_size=16, growth=upcycle),
        Stage(tokens=400_000, batch_size=16, growth=ExpertsCopy(factor=2, noise=0.1)),
    )
    return dataclasses.replace(config, model=model, stages=stages, workdir="runs/moe_tiny")
