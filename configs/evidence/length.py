"""Does growth pay at 20, 80 and 320 tokens per parameter, standard and under CompleteP?

    python -m scripts.evidence configs/evidence/length.py --jobs 2

trains scratch, `stack(4)` and `interleave(4)` with 0.1M parameters; bench.py makes the data.
"""

import bench

from stackjax.config import Config


def get_arms() -> list[tuple[dict[str, str], Config]]:
    """Returns labels and config of each arm."""
    return [
        (
            {
                "run": growth,
                "parametrization": parametrization,
                "tokens per parameter": str(length),
            },
            bench.run(growth, length, parametrization=parametrization),
        )
        for length in (20, 80, 320)
        for parametrization in ("standard", "CompleteP")
        for growth in ("scratch", "stack(4)", "interleave(4)")
    ]
