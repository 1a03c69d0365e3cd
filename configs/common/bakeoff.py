"""Shared code for comparisons of growths: runs of the same target with equal FLOPs.

For `python -m scripts.bakeoff configs/NAME.py`.
"""

import dataclasses
from collections.abc import Mapping

from stackjax.analysis.budget import cell
from stackjax.config import Config, Stage
from stackjax.growth import chain, parse_growth

PATTERNS = {
    pattern: f"layer_map({pattern})"
    for pattern in (
        "123456*4",
        "12-3456*5-56",
        "12-345*7-6",
        "123-456*7",
        "1234-56*10",
        "12-34*10-56",
        "1-234*7-56",
        "123*7-456",
    )
}
"""Table 5 in arXiv:2405.15319, 6 to 24 layers, best first."""


def noisy() -> dict[str, str]:
    """Returns stacking and an uneven split, with 0, 20 and 50 % noise."""
    growths = {
        "stack": "stack(4)",
        "split": "width_split(embed=2, mlp=2, heads=2, split=uneven)",
    }
    return {
        f"{name}, noise {alpha}": f"{growth}+noise({alpha})"
        for name, growth in growths.items()
        for alpha in (0, 0.2, 0.5)
    }


def operators(*, mask_tokens: int, fit_steps: int) -> dict[str, str]:
    """Returns the eight operators of arXiv:2405.15319, figure 3, with growth factor 4.

    Depth: 4 times the layers. Width: twice the channels, units and heads.
    """
    wide = "embed=2, mlp=2, heads=2"
    return {
        "direct, depth": "stack(4)",
        "zero, depth": "depth_zero(factor=4)",
        "random, depth": f"depth_random(factor=4, mask_tokens={mask_tokens})",
        "learned, depth": f"learn(factor=4, fit_steps={fit_steps})",
        "direct, width": f"width_split({wide}, split=uneven)",
        "zero, width": f"width_zero({wide})",
        "random, width": f"width_random({wide}, mask_tokens={mask_tokens})",
        "learned, width": f"learn({wide}, fit_steps={fit_steps})",
    }


def runs(
    grown: Config,
    growths: Mapping[str, str],
    *,
    timings: Mapping[str, int],
    flops: float,
    seed: int,
) -> dict[str, Config]:
    """Returns a run for each growth and growth timing, and a run from scratch.

    Args:
      grown: A two-stage run; its model is the target of all runs.
      growths: Growths of the last stage, as text, by name.
      timings: Tokens of the first stage (d), by name.
      flops: FLOPs (6ND) per run, including the small model and a fit.
    """
    found = grown_runs(grown, growths, timings=timings, flops=flops, seed=seed)
    return found | {"scratch": scratch_run(grown, flops=flops, seed=seed)}


def grown_runs(
    grown: Config,
    growths: Mapping[str, str],
    *,
    timings: Mapping[str, int],
    flops: float,
    seed: int,
) -> dict[str, Config]:
    """Returns a run for each growth and growth timing; see `runs` for the arguments."""
    base, last = grown.stages
    found = {}
    for timing, tokens in timings.items():
        for growth, text in growths.items():
            stages = (
                dataclasses.replace(base, tokens=tokens),
                dataclasses.replace(last, growth=parse_growth(text)),
            )
            name = f"{growth}, {timing}"
            found[name] = _run(grown, name, stages, flops, seed)
    return found


def gradual(grown: Config, *, flops: float, seed: int) -> dict[str, Config]:
    """Returns the three-stage run, single growths early and late, and scratch.

    The early growth comes with the first growth of the gradual run, the late growth with the
    last.
    """
    first, second, last = grown.stages
    growths = [stage.growth for stage in grown.stages if stage.growth is not None]
    hop = dataclasses.replace(last, growth=chain(*growths))
    late = dataclasses.replace(first, tokens=(first.tokens or 0) + (second.tokens or 0))
    stages = {
        "gradual, d": grown.stages,
        "one hop, d": (first, hop),
        "late hop, d": (late, hop),
    }
    runs = {name: _run(grown, name, each, flops, seed) for name, each in stages.items()}
    return runs | {"scratch": scratch_run(grown, flops=flops, seed=seed)}


def scratch_run(grown: Config, *, flops: float, seed: int) -> Config:
    """Returns the target's run from scratch, with equal FLOPs."""
    stage = dataclasses.replace(grown.stages[-1], growth=None)
    return _run(grown, "scratch", (stage,), flops, seed)


def _run(
    grown: Config, name: str, stages: tuple[Stage, ...], flops: float, seed: int
) -> Config:
    return cell(dataclasses.replace(grown, stages=stages), name, flops=flops, seed=seed)
