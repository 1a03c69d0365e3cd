"""One layer to twelve at 80 % of the tokens (arXiv:2511.04981 v2), on a CPU.

    python -m stackjax.train --config configs/recipes/one_layer_tiny.py
    python -m scripts.bakeoff configs/recipes/one_layer_tiny.py --jobs 2 --seeds 1

The first command trains the paper's recipe, in about two minutes on two cores: one layer, then 12
copies of it, Muon, a single WSD schedule. The second compares copies, new layers and growth from
zero layers, with Muon and AdamW, for the FLOPs of 400,000 bytes from scratch.

As in the source: growth after 80 % of the tokens, warm-up of 2 %, decay in the last 10 %, the same
rate before and after growth. Different: the size; all that one_layer_124m.py lists.
"""

import dataclasses

from parts import one_layer, sizes

from stackjax.config import Config
from stackjax.growth import Stack
from stackjax.model.flops import flops_6nd
from stackjax.optimizers import Muon

SCRATCH = sizes.tiny("one_layer_tiny")
FLOPS = 400_000 * flops_6nd(SCRATCH.model)
OPTIMIZERS = {
    "Muon": dataclasses.replace(SCRATCH, optimizer=Muon(peak_learning_rate=4e-3)),
    "AdamW": SCRATCH,
}


def get_config() -> Config:
    """Returns the run with copies, and Muon."""
    return one_layer.grown(OPTIMIZERS["Muon"], Stack(12), flops=FLOPS)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return one_layer.runs(OPTIMIZERS, flops=FLOPS, seed=seed)
