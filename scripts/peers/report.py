"""Results of a peer comparison, as a table and a file."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from scripts.peers.peer import SHAPES, Shape
from stackjax.runtime.text_table import markdown_table

PACKAGES = {
    "stackjax": ("jax",),
    "plain": ("jax",),
    "maxtext": ("jax", "maxtext"),
    "litgpt": ("torch", "litgpt"),
    "transformers": ("torch", "transformers"),
}
"""Packages with stated versions, by peer."""
JAX_PEERS = tuple(name for name, packages in PACKAGES.items() if "jax" in packages)
OURS = "stackjax"
BY_RATIO = {
    "tiny": {"nanodo": 4148 / 4590, "levanter": 4164 / 4590},
    "small": {"nanodo": 635 / 573, "levanter": 560 / 573},
}
"""Tokens/s over `plain`, for JAX peers without a compatible installation.

Measured together with `plain` on two Xeon cores with AVX-512, as shipped, without an
environment; Levanter from September 2025. nanodo has another model, so the ratio is in FLOP/s.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A peer's results."""

    seconds: list[float]
    """Of each round."""
    steps: int
    """Of each round."""
    first_step_seconds: float
    """From process start to the end of the first step."""
    peak_rss_mb: float
    num_params: int
    losses: list[float]
    """After the first step, after the warm-up, and after each round."""

    def tokens_per_second(self, shape: Shape) -> list[float]:
        """Returns tokens/s per round."""
        tokens = self.steps * shape.batch_size * shape.seq_len
        return [tokens / seconds for seconds in self.seconds]


def medians(peers: Mapping[str, Measured], shape_name: str) -> dict[str, float]:
    """Returns every peer's tokens/s, including peers known by ratio."""
    shape = SHAPES[shape_name]
    known = {
        name: statistics.median(peer.tokens_per_second(shape)) for name, peer in peers.items()
    }
    if "plain" in known:
        known |= {name: ratio * known["plain"] for name, ratio in BY_RATIO[shape_name].items()}
    return known


def yardstick(tokens_per_second: Mapping[str, float]) -> str:
    """Returns the fastest JAX peer except ours, or the fastest peer if there is none."""
    others = [
        name
        for name in tokens_per_second
        if name in (*JAX_PEERS, *BY_RATIO["tiny"]) and name != OURS
    ]
    return max(others or tokens_per_second, key=lambda name: tokens_per_second[name])


def table(peers: Mapping[str, Measured], shape_name: str) -> str:
    """Returns a Markdown table, fastest first, and a line with parameter counts."""
    known = medians(peers, shape_name)
    fastest = yardstick(known)
    heads = ("peer", "tokens/s", "p10", "p90", f"over {fastest}", "first step s", "peak RSS MB")
    rows = []
    for name in sorted(known, key=lambda name: known[name], reverse=True):
        spread, cost = ("", ""), ("", "", "by ratio to plain")
        if name in peers:
            peer = peers[name]
            tokens_per_second = peer.tokens_per_second(SHAPES[shape_name])
            spread = tuple(f"{x:,.0f}" for x in np.percentile(tokens_per_second, (10, 90)))
            cost = (
                f"{peer.first_step_seconds:.1f}",
                f"{peer.peak_rss_mb:,.0f}",
                f"{peer.losses[0]:.2f} to {peer.losses[-1]:.2f}",
            )
        ratio = f"{known[name] / known[fastest]:.2f}"
        rows.append((name, f"{known[name]:,.0f}", *spread, ratio, *cost))
    return "\n".join([markdown_table((*heads, "loss"), rows), "", _parameters(peers)])


def _parameters(peers: Mapping[str, Measured]) -> str:
    by_count: dict[int, list[str]] = {}
    for name, peer in peers.items():
        by_count.setdefault(peer.num_params, []).append(name)
    if len(by_count) == 1:
        return f"Parameters: {next(iter(by_count)):,} in all of them."
    counts = (f"{count:,} in {', '.join(names)}" for count, names in by_count.items())
    return "Parameters differ: " + "; ".join(counts) + "."


def origin(peers: Mapping[str, Measured], settings: Mapping[str, Any]) -> str:
    """Returns a line with date, machine and versions."""
    one = next(iter(peers.values()))
    versions = (f"{package} {version}" for package, version in settings["versions"].items())
    return (
        f"{settings['date']}, {len(one.seconds)} turns of {one.steps} steps on "
        f"{settings['num_cores']} cores of {settings['cpu']}: {', '.join(versions)}."
    )


def contents(
    peers: Mapping[str, Measured], shape_name: str, settings: Mapping[str, Any]
) -> dict[str, object]:
    """Returns the content of the results file.

    Args:
      settings: Date, machine, versions and environment.
    """
    return {
        "shape": {"name": shape_name} | dataclasses.asdict(SHAPES[shape_name]),
        "settings": dict(settings),
        "tokens_per_second": medians(peers, shape_name),
        "peers": {name: dataclasses.asdict(peer) for name, peer in peers.items()},
    }
