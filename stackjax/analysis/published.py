"""What publications have found about growth, for the plan of a run: speed-ups, and advice."""

import dataclasses
import math

from stackjax.analysis.timing import SCALE_FREE
from stackjax.flops import num_params
from stackjax.model import ModelConfig

CHINCHILLA = 20
"""Tokens of a parameter that are one budget of arXiv:2203.15556."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A speed-up that arXiv:2405.15319 measured, all stages charged."""

    name: str
    params: float
    """N, as the paper names it."""
    tokens: float
    """Tokens of scratch (D), whose loss the grown run reached sooner."""
    speedup: float
    """FLOPs of scratch over those of the grown run, less 1."""
    where: str

    @property
    def fewer_flops(self) -> float:
        """The share of scratch's FLOPs that was saved."""
        return 1 - 1 / (1 + self.speedup)


PUBLISHED = (
    Published("410M", 0.41e9, 400e9, 0.531, "Fig. 6"),
    Published("410M", 0.41e9, 530e9, 0.337, "Fig. 6"),
    Published("410M", 0.41e9, 700e9, 0.310, "Fig. 6"),
    Published("1.1B", 1.1e9, 100e9, 0.390, "project page"),
    Published("1.1B", 1.1e9, 100e9, 0.491, "Fig. 3"),
    Published("3B", 3e9, 180e9, 0.486, "Fig. 4"),
    Published("3B", 3e9, 240e9, 0.545, "Fig. 4"),
    Published("7B", 7e9, 160e9, 0.408, "Fig. 5"),
    Published("7B", 7e9, 220e9, 0.553, "Fig. 5"),
    Published("7B", 7e9, 280e9, 0.538, "Fig. 5"),
    Published("7B", 7e9, 300e9, 0.546, "Fig. 1"),
)
"""G_stack with g = 4 and d = 10B; 530B, and 39.0 %, are read off pictures."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """What a publication would do otherwise."""

    source: str
    text: str


def nearest_published(params: float, tokens: float) -> tuple[Published, ...]:
    """Returns the speed-ups of the published size nearest in N, and those nearest in D / N."""

    def in_size(each: Published) -> float:
        return abs(math.log(each.params / params))

    def in_length(each: Published) -> float:
        return abs(math.log(each.tokens / each.params * params / tokens))

    size, length = min(map(in_size, PUBLISHED)), min(map(in_length, PUBLISHED))
    return tuple(
        each for each in PUBLISHED if in_size(each) == size or in_length(each) == length
    )


def other_advice(
    factor: int, small_tokens: float, tokens: float, small: ModelConfig
) -> tuple[Advice, ...]:
    """Returns what publications would do otherwise than stack `small` after its tokens.

    Args:
      small_tokens: Tokens of the small model (d).
      tokens: Tokens from scratch (D).
    """
    low, high = SCALE_FREE
    advice, seen = [], small_tokens / num_params(small)
    if not low <= small_tokens / tokens <= high:
        text = (
            f"d of {100 * low:g} to {100 * high:g} % of D, where the optima of "
            f"arXiv:2405.15319 lie at 1.1B: {low * tokens:.3g} to {high * tokens:.3g} tokens "
            f"instead of {small_tokens:.3g}."
        )
        advice.append(Advice("scale-free rule", text))
    if seen > CHINCHILLA:
        text = (
            f"interleave({factor}) instead of stack({factor}): it wins once the small model "
            f"has seen about 1 Chinchilla budget, {CHINCHILLA} tokens a parameter; this one "
            f"sees {seen:.3g}."
        )
        advice.append(Advice("arXiv:2510.08008", text))
    text = (
        "grow very late, from one layer: a single expansion at 80 % of training, under WSD. "
        "(In arXiv:2405.15319, with a cosine and d = 10B, one layer loses to scratch.)"
    )
    advice.append(Advice("arXiv:2511.04981", text))
    if factor > 2:
        text = "a factor of 2 is the safest; from some factor on, scratch wins."
        advice.append(Advice("arXiv:2605.13405", text))
    if factor > 4 or small.num_layers == 1:
        text = "factors of 2 to 4 are the best of 2 to 32, and one layer loses to scratch."
        advice.append(Advice("arXiv:2405.15319", text))
    return tuple(advice)
