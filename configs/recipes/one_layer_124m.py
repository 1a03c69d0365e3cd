"""One layer to twelve at 80 % of the tokens (arXiv:2511.04981 v2), at GPT-2's size, 124M.

    python -m stackjax.train --config configs/recipes/one_layer_124m.py
    python -m scripts.bakeoff configs/recipes/one_layer_124m.py --dry-run

The first command trains the paper's recipe: one layer (46M parameters), then 12 copies of it, Muon,
a single WSD schedule. The second prints a command for each of copies, copies with a warm-up of new
layers, new layers, growth from zero layers (39M) and scratch, with Muon and with AdamW.

As in the source: sizes of the source and target, OpenWebText with GPT-2's tokenizer, growth after
80 % of the tokens, warm-up of 2 %, decay in the last 10 %, the same rate before and after growth.

Different: the paper compares runs with equal tokens; here all runs have the FLOPs of 4 billion
tokens from scratch, so grown runs see twice as many. A LLaMA-style model, not GPT-2's. Muon with
AdamW for embedding and gains, where the paper has normalized SGD; no muP; AdamW is ours.

The source does not say, as far as we could read it: the optimizer state after growth (here old
moments are kept), a warm-up of new layers (here a separate run, 2 % of the tokens), and the final
rate (here 0). Peak rates are ours and not tuned.
"""

import dataclasses

from parts import one_layer, sizes

from stackjax.config import Config
from stackjax.growth import Stack
from stackjax.model.flops import flops_6nd
from stackjax.optimizers import Muon

SCRATCH = sizes.gpt2("one_layer_124m")
FLOPS = 4_000_000_000 * flops_6nd(SCRATCH.model)
OPTIMIZERS = {
    "Muon": dataclasses.replace(SCRATCH, optimizer=Muon(peak_learning_rate=2e-3)),
    "AdamW": SCRATCH,
}


def get_config() -> Config:
    """Returns the run with copies, and Muon."""
    return one_layer.grown(OPTIMIZERS["Muon"], Stack(12), flops=FLOPS)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return one_layer.runs(OPTIMIZERS, flops=FLOPS, seed=seed)
