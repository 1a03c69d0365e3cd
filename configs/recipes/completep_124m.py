"""Stacking and interleaving under CompleteP (arXiv:2505.01618), at 124M: 3 layers to 12.

    python -m stackjax.train --config configs/recipes/completep_124m.py
    python -m scripts.bakeoff configs/recipes/completep_124m.py --dry-run

The first command interleaves under CompleteP. The second prints a command for stacking, interleaving
and scratch, standard and under CompleteP, all for the FLOPs of 4 billion tokens from scratch.

As in the source: residual branches divided by the depth relative to a base model, and the factors of
rates, decay and epsilon in docs/parametrization.md. The base is the small model, so it is a standard
model, and its peak rate also holds for the grown one.

Different: the source trains all models from scratch and has no growth. arXiv:2405.15319 finds
stacking better than interleaving for standard models, where each copy counts as much as its original.
Under CompleteP, four copies have a quarter of the branch each.

The sources do not say what a growth does to the optimizer here (reset, with a new warm-up and
cosine in each stage), nor when to grow (here after half of the tokens). One peak rate for all runs,
ours and not tuned, so scratch and standard models may prefer another.
"""

from parts import completep, sizes

from stackjax.config import Config
from stackjax.growth import Interleave
from stackjax.model.flops import flops_6nd

SCRATCH = sizes.gpt2("completep_124m")
FLOPS = 4_000_000_000 * flops_6nd(SCRATCH.model)


def get_config() -> Config:
    """Returns the run with interleaving, under CompleteP."""
    run = completep.under_completep(SCRATCH)
    return completep.grown(run, Interleave(completep.FACTOR), flops=FLOPS)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return completep.runs(SCRATCH, flops=FLOPS, seed=seed)
