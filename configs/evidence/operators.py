"""Which operator in depth, each at its best learning rate?

    python -m scripts.evidence configs/evidence/operators.py --seeds 5 --jobs 2

trains the four operators of arXiv:2405.15319 from 2 to 8 layers, and `interleave(4)`. Masks open
over a tenth of the tokens from scratch; a fit takes 100 steps, as in the paper.
"""

import bench

from stackjax.config import Config


def get_arms() -> list[tuple[dict[str, str], Config]]:
    """Returns labels and config of each arm."""
    return [
        (
            {"run": name, "tokens per parameter": str(length)},
            bench.run(growth, length),
        )
        for length in (20, 80)
        for name, growth in (
            ("scratch", "scratch"),
            ("stack", "stack(4)"),
            ("interleave", "interleave(4)"),
            ("zero", "depth_zero(factor=4)"),
            ("random", f"depth_random(factor=4, mask_tokens={bench.tokens(length) // 10})"),
            ("learned", "learn(factor=4, fit_steps=100)"),
        )
    ]
