"""Published results about growth: speed-ups, task scores and advice."""

import dataclasses
import math
from collections.abc import Mapping

from stackjax.analysis.timing import SCALE_FREE
from stackjax.model import ModelConfig
from stackjax.model.flops import num_params
from stackjax.options import ACCURACY_TASKS

CHINCHILLA = 20
"""Tokens per parameter in a compute-optimal run (arXiv:2203.15556)."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A speed-up measured in arXiv:2405.15319, all stages included."""

    name: str
    params: float
    """Nominal N."""
    tokens: float
    """Tokens from scratch (D)."""
    speedup: float
    """Scratch's FLOPs over the grown run's FLOPs, minus 1."""
    where: str

    @property
    def fewer_flops(self) -> float:
        """Saved share of scratch's FLOPs."""
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
"""G_stack with g = 4 and d = 10B. 530B and 39.0 % are read off figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedScores:
    """A model's task scores, from arXiv:2405.15319."""

    name: str
    """Model and size."""
    trained: str
    """Training tokens or FLOPs."""
    average: float
    """Mean accuracy on `ACCURACY_TASKS`, in percent."""
    wikitext: float | None = None
    """Word perplexity."""
    accuracies: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Accuracies in percent, if published."""
    where: str


def _in_figure_3(
    name: str, average: float, wikitext: float, *accuracies: float
) -> PublishedScores:
    return PublishedScores(
        name=f"{name} 1.1B",
        trained="8e20 FLOPs",
        average=average,
        wikitext=wikitext,
        accuracies=dict(zip(ACCURACY_TASKS, accuracies, strict=True)),
        where="Fig. 3",
    )


def _in_table(
    name: str, trained: str, average: float, wikitext: float | None, table: int
) -> PublishedScores:
    return PublishedScores(
        name=name,
        trained=trained,
        average=average,
        wikitext=wikitext,
        where=f"Table {table}",
    )


PUBLISHED_SCORES = (
    _in_figure_3("G_stack", 52.80, 16.73, 48.20, 29.18, 54.25, 28.87, 71.98, 81.1, 56.03),
    _in_figure_3("G_zero depth", 52.48, 17.35, 48.67, 28.32, 51.76, 27.95, 71.81, 81.9, 56.98),
    _in_figure_3(
        "G_random depth", 50.43, 17.85, 44.14, 28.41, 52.69, 25.96, 70.78, 77.7, 53.35
    ),
    _in_figure_3("G_learn depth", 51.52, 16.93, 48.36, 27.38, 51.17, 28.11, 71.16, 80.0, 54.45),
    _in_figure_3(
        "G_direct width", 51.25, 18.03, 46.16, 28.58, 51.55, 27.34, 69.47, 81.4, 54.22
    ),
    _in_figure_3("G_zero width", 49.54, 18.76, 44.67, 26.70, 49.70, 25.03, 69.74, 76.0, 54.93),
    _in_figure_3(
        "G_random width", 50.63, 18.29, 44.24, 27.64, 53.82, 26.11, 70.13, 79.5, 52.95
    ),
    _in_figure_3("G_learn width", 50.32, 18.44, 45.66, 26.70, 50.37, 26.57, 69.91, 79.5, 53.51),
    _in_figure_3("scratch", 50.12, 17.98, 47.87, 27.21, 48.86, 25.96, 69.64, 76.8, 54.53),
    _in_table("Pythia 1B", "100B", 50.53, None, 3),
    _in_table("scratch 1.1B", "100B", 50.09, None, 3),
    _in_table("G_stack 3B", "290B", 55.66, None, 2),
    _in_table("scratch 3B", "400B", 54.36, None, 2),
    _in_table("G_stack 7B", "130B", 57.79, 12.56, 6),
    _in_table("Pythia 6.9B", "130B", 56.56, 13.33, 6),
    _in_table("OLMo 7B", "130B", 50.43, 18.47, 6),
    _in_table("Amber 7B", "130B", 54.16, 15.62, 6),
    _in_table("G_stack Samba 410M", "47B", 46.20, None, 7),
    _in_table("scratch Samba 410M", "50B", 45.06, None, 7),
)
"""Models in a figure or table have similar budgets. Grown models have d = 10B (Samba 8B)."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """Conflicting advice from a publication, or a measurement of this project."""

    source: str
    text: str


def nearest_published(params: float, tokens: float) -> tuple[Published, ...]:
    """Returns the speed-ups at the nearest published N, and at the nearest D / N."""

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
    """Returns advice against stacking `small` after `small_tokens`.

    Args:
      small_tokens: Tokens before growth (d).
      tokens: Tokens from scratch (D).
    """
    low, high = SCALE_FREE
    advice, seen = [], small_tokens / num_params(small)
    if not low <= small_tokens / tokens <= high:
        text = (
            f"d of {100 * low:g} to {100 * high:g} % of D, the optimal range at 1.1B in "
            f"arXiv:2405.15319: {low * tokens:.3g} to {high * tokens:.3g} tokens instead of "
            f"{small_tokens:.3g}."
        )
        advice.append(Advice("scale-free rule", text))
    if seen > CHINCHILLA:
        text = (
            f"interleave({factor}) instead of stack({factor}): interleaving wins if the small "
            f"model has seen about {CHINCHILLA} tokens per parameter; here it sees {seen:.3g}."
        )
        advice.append(Advice("arXiv:2510.08008", text))
    text = (
        "at 20 tokens per parameter, with 0.1M parameters and the learning rate tuned for each "
        "side, stack(4) ends 0.018 nats below scratch (95 % interval -0.006 to 0.043) and "
        "0.034 below interleave(4): no certain gain over scratch at this length. Growth after "
        "10 to 20 % of the FLOPs is best; after 80 %, or by a factor of 8, it loses to scratch."
    )
    advice.append(Advice("docs/evidence.md", text))
    text = (
        "grow once from a single layer, at 80 % of training, with a WSD schedule. (In "
        "arXiv:2405.15319, with a cosine and d = 10B, a single layer loses to scratch.)"
    )
    advice.append(Advice("arXiv:2511.04981", text))
    if factor > 2:
        text = "a factor of 2 is the safest; at large factors scratch wins."
        advice.append(Advice("arXiv:2605.13405", text))
    if factor > 4 or small.num_layers == 1:
        text = "factors of 2 to 4 are the best of 2 to 32; a single layer loses to scratch."
        advice.append(Advice("arXiv:2405.15319", text))
    return tuple(advice)
