"""Stacking in nanochat, d6 to d12, and its deviations from arXiv:2405.15319.

    python -m stackjax.train --config configs/recipes/nanochat_stack_d12.py
    python -m scripts.bakeoff configs/recipes/nanochat_stack_d12.py --dry-run

The first command trains the replication with the latest growth, on one GPU or more. The second
prints a command for every run: five timings, each switch turned alone, all four turned, and scratch
for each optimizer and schedule. The source is the script runs/stackseries_fixedflops.sh of
github.com/dvshkn/nanochat. Its four deviations are the switches:

| switch | replication | the paper |
|---|---|---|
| growth factor | 2 | 4 |
| optimizer | Muon | AdamW |
| optimizer state | reset | not stated; its code resets too; here grow and keep |
| schedule | constant; after growth, linear decay to 0 from the first step | warm-up of 3000 steps in each stage, then the beginning of a cosine over 300,000 steps |

The paper's schedule is scaled by the number of steps, 46,500 after growth in its 1.1B run. With
factor 4 and the same tokens per parameter, the small model sees fewer tokens.

As in the source: d12's width, heads of 128 channels, vocabulary, normalized queries and keys, untied
head, sequences and batch; small models at 1.25 to 5.25 tokens per parameter, the target from scratch
at 10.5, with a decay in its second half. Parameters are counted without the embedding.

Different: SwiGLU for squared ReLU, gains in all norms, full attention; no residual scalars and no
value embeddings. FLOPs are 6ND with the embedding and without attention; the source counts the
opposite. One rate for all parameters: with Muon's, an update of a square matrix is as large as with
nanochat's 0.02. AdamW's rate is ours. Weight decay is 0.1 for all matrices.
"""

from parts import nanochat_stack, sizes

from stackjax.config import Config

SCRATCH = sizes.nanochat("nanochat_stack_d12")
MUON = 3.6e-3


def get_config() -> Config:
    """Returns the replication with the latest growth."""
    timing = nanochat_stack.TIMINGS[-1]
    return nanochat_stack.grown(SCRATCH, nanochat_stack.Setting(), timing, muon=MUON)


def get_runs(seed: int) -> dict[str, Config]:
    """Returns all runs."""
    return nanochat_stack.runs(SCRATCH, muon=MUON, seed=seed)
