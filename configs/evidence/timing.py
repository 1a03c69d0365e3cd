"""When to grow, and by how much, under WSD and cosine?

    python -m scripts.evidence configs/evidence/timing.py --jobs 2

trains `stack(4)` after 2, 10, 20, 40 and 80 % of the FLOPs, `stack(2)` and `stack(8)` after 20 %,
and 12 layers from one layer after 20 and 80 %.
"""

import bench

from stackjax.config import Config

SHARES = (0.02, 0.1, 0.2, 0.4, 0.8)


def get_arms() -> list[tuple[dict[str, str], Config]]:
    """Returns labels and config of each arm."""
    runs: list[tuple[int, str, float | None]] = [
        (8, "scratch", None),
        (12, "scratch", None),
        *((8, "stack(4)", share) for share in SHARES),
        (8, "stack(2)", 0.2),
        (8, "stack(8)", 0.2),
        (12, "stack(12)", 0.2),
        (12, "stack(12)", 0.8),
    ]
    shapes: tuple[bench.Shape, ...] = ("wsd", "cosine")
    return [_arm(*run, shape) for shape in shapes for run in runs]


def _arm(
    layers: int, growth: str, share: float | None, shape: bench.Shape
) -> tuple[dict[str, str], Config]:
    labels = {
        "run": growth,
        "layers": str(layers),
        "grown after": "" if share is None else f"{100 * share:.0f} %",
        "schedule": shape,
        "tokens per parameter": "20",
    }
    return labels, bench.run(growth, 20, layers=layers, shape=shape, share=share or 0.0)
