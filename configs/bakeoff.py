"""What comparisons of growths share: runs of one target that all cost the same FLOPs.

Not an experiment: the files beside it are. Those with a `get_runs` are run, tabled and drawn
by `python -m scripts.bakeoff configs/NAME.py`.
"""

import dataclasses
from collections.abc import Mapping

from stackjax.config import Config
from stackjax.growth import parse_growth
from stackjax.phases import last_stage_tokens

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
"""Table 5 of arXiv:2405.15319, 6 layers to 24, in its order: best first."""


def noisy() -> dict[str, str]:
    """Returns stacking and an uneven split, each with 0, 20 and 50 % of noise."""
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
    """Returns the eight operators of figure 3 of arXiv:2405.15319, to four times the size.

    In depth four times the layers, in width twice the channels, units and heads.
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
    """Returns a run for each growth and growth timing, and one from scratch.

    Args:
      grown: A run of two stages; its model is everyone's target.
      growths: The growth of the last stage, as text, by name.
      timings: Tokens of the first stage (d) by name.
      flops: What every run costs (6ND), the small model and a fit included.
    """
    cells = {
        f"{name}, {d}": (growth, tokens)
        for d, tokens in timings.items()
        for name, growth in growths.items()
    }
    base, last = grown.stages
    found = {}
    for name, (growth, tokens) in cells.items():
        stages = (
            dataclasses.replace(base, tokens=tokens),
            # More than it can need, until its length is settled.
            dataclasses.replace(last, tokens=10**15, growth=parse_growth(growth)),
        )
        found[name] = _cell(grown, name, stages, flops, seed)
    scratch = (dataclasses.replace(last, tokens=10**15, growth=None),)
    return found | {"scratch": _cell(grown, "scratch", scratch, flops, seed)}


def _cell(grown: Config, name: str, stages: tuple, flops: float, seed: int) -> Config:
    slug = name.replace(", ", "-").replace(" ", "_").replace("*", "x")
    config = dataclasses.replace(
        grown, stages=stages, seed=seed, workdir=f"{grown.workdir}/{slug}-seed_{seed}"
    )
    length = last_stage_tokens(config, flops)
    settled = (*stages[:-1], dataclasses.replace(stages[-1], tokens=length))
    return dataclasses.replace(config, stages=settled)
