"""Speed of the loader with one source and with several."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from scripts.measure.result import median
from scripts.measure.shards import write_synthetic
from stackjax.data.batch import Batch
from stackjax.data.config import DataConfig
from stackjax.data.loader import train_batches
from stackjax.data.mixture import Mixture
from stackjax.data.open import Source
from stackjax.data.order import Order, Segment
from stackjax.data.packed_source import PackedSource

VOCAB_SIZE = 32_000
BATCH_TOKENS = 2**18
TURN_BATCHES = 16
WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "one source": (1.0,),
    "five sources": (1.0,) * 5,
    "five sources, 50:20:15:10:5": (50.0, 20.0, 15.0, 10.0, 5.0),
}
Packing = Literal["joined", "best_fit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """The loader alone, in one process."""

    tokens_per_second: float
    """Median over all turns."""
    cpu_tokens_per_second: float
    """Median over all turns, per second of CPU time, which other load changes less."""
    of_one_source: float
    """Median over all turns: this last rate divided by that of one source, joined."""


class Rates(NamedTuple):
    """Tokens per second in a turn."""

    wall: float
    cpu: float


def measure_mixtures(seq_len: int, num_turns: int) -> dict[str, Loading]:
    """Returns the loader's speed by packing and mixture.

    All take turns, so other load on the machine slows all of them equally.
    """
    with tempfile.TemporaryDirectory() as directory:
        sources = [
            write_synthetic(
                Path(directory, str(index)), VOCAB_SIZE, seq_len, name=str(index), seed=index
            )
            for index in range(max(map(len, WEIGHTS.values())))
        ]
        packings: dict[Packing, Sequence[Source]] = {
            "joined": sources,
            "best_fit": [PackedSource(source) for source in sources],
        }
        loaders = {
            f"{packing}, {name}": _load(of_packing[: len(weights)], packing, weights)
            for packing, of_packing in packings.items()
            for name, weights in WEIGHTS.items()
        }
        turns = [
            {name: _rates(batches) for name, batches in loaders.items()}
            for _ in range(1 + num_turns)
        ][1:]  # the first one warms up
    base = next(iter(loaders))
    return {
        name: Loading(
            tokens_per_second=median([turn[name].wall for turn in turns]),
            cpu_tokens_per_second=median([turn[name].cpu for turn in turns]),
            of_one_source=median([turn[name].cpu / turn[base].cpu for turn in turns]),
        )
        for name in loaders
    }


def _rates(batches: Iterator[Batch]) -> Rates:
    """Returns the speed of a loader, after the prefetched batches are used up."""
    for _ in range(DataConfig.prefetch + 1):
        num_tokens = TURN_BATCHES * next(batches).tokens.size
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(TURN_BATCHES):
        next(batches)
    return Rates(
        wall=num_tokens / (time.perf_counter() - start),
        cpu=num_tokens / (time.process_time() - start_cpu),
    )


def _load(
    sources: Sequence[Source], packing: Packing, weights: tuple[float, ...]
) -> Iterator[Batch]:
    seq_len = sources[0].seq_len
    order = Order(
        seed=0,
        chunk_len=seq_len,
        num_chunks=tuple(map(len, sources)),
        segments=(Segment(first_example=0, seq_len=seq_len, mixture=Mixture(weights=weights)),),
    )
    return train_batches(
        sources,
        DataConfig(path="synthetic", seq_len=seq_len, packing=packing),
        order,
        first_example=0,
        batch_size=BATCH_TOKENS // seq_len,
        accumulate=1,
        rows=slice(None),
    )
