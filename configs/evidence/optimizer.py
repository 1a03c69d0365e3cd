"""Which optimizer state and which warm-up after growth, for AdamW and Muon?

    python -m scripts.evidence configs/evidence/optimizer.py --jobs 2

trains `stack(4)` with moments reset, grown with the gradients, and kept for old layers, each without
warm-up and with a warm-up over 4 % of the tokens from scratch.
"""

import itertools

import bench

from stackjax.config import Config

OPTIMIZERS = {"AdamW": bench.ADAMW, "Muon": bench.MUON}


def get_arms() -> list[tuple[dict[str, str], Config]]:
    """Returns labels and config of each arm."""
    arms = []
    for name, optimizer in OPTIMIZERS.items():
        arms.append((_labels("scratch", name), bench.run("scratch", 20, optimizer=optimizer)))
        for state, warmup in itertools.product(("reset", "grow", "keep"), (0.0, 0.04)):
            config = bench.run("stack(4)", 20, optimizer=optimizer, state=state, warmup=warmup)
            arms.append((_labels("stack(4)", name, state, f"{100 * warmup:.0f} %"), config))
    return arms


def _labels(run: str, optimizer: str, state: str = "", warmup: str = "") -> dict[str, str]:
    return {
        "run": run,
        "optimizer": optimizer,
        "optimizer state": state,
        "warm-up": warmup,
        "tokens per parameter": "20",
    }
