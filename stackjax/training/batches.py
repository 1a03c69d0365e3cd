"""Batches of a phase, and the order of a run's data."""

import math
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from stackjax.config import Config
from stackjax.data.batch import Batch
from stackjax.data.device import local_rows, put
from stackjax.data.loader import train_batches
from stackjax.data.open import Source
from stackjax.data.order import Order, Segment, epochs_read, join_segments, tokens_read
from stackjax.data.packed_source import PackedSource
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short
from stackjax.training.phase import Phase


def data_order(sources: Sequence[Source], seed: int, phases: Sequence[Phase]) -> Order:
    """Returns the order of the data in a run with these phases."""
    chunk_len = longest(phases)
    segments = (
        Segment(
            first_example=phase.start.examples, seq_len=phase.seq_len, mixture=phase.mixture
        )
        for phase in phases
    )
    return Order(
        seed=seed,
        chunk_len=chunk_len,
        num_chunks=tuple(len(source.with_length(chunk_len)) for source in sources),
        segments=join_segments(tuple(segments)),
    )


def longest(phases: Sequence[Phase]) -> int:
    """Returns the longest sequence in a run, in tokens."""
    return max(phase.seq_len for phase in phases)


def phase_batches(
    sources: Sequence[Source],
    config: Config,
    phases: Sequence[Phase],
    phase: Phase,
    mesh: Mesh,
    first_example: int,
    num_steps: int,
) -> Iterator[Batch]:
    """Returns the batches for some steps of a phase, on the devices of the mesh."""
    num_rows = phase.batch_size // phase.accumulate
    batches = train_batches(
        sources,
        config.data,
        data_order(sources, config.seed, phases),
        first_example=first_example,
        batch_size=phase.batch_size,
        accumulate=phase.accumulate,
        rows=local_rows(mesh, num_rows),
        num_batches=num_steps,
    )
    return put(batches, mesh, num_rows)


def check_epochs(config: Config, sources: Sequence[Source], phases: Sequence[Phase]) -> None:
    """Raises UserError if the run reads a source more often than allowed."""
    order = data_order(sources, config.seed, phases)
    read = tokens_read(order, phases[-1].end.examples)
    held_S = order.epoch_tokens.tolist()
    listed = zip(sources, config.data.all_sources, held_S, read, strict=True)
    for source, allowed, held, tokens in listed:
        missing = tokens - held * (allowed.max_epochs or math.inf)
        if missing > 0:
            raise UserError(
                f"the run reads {tokens:,} tokens from the source {source.name!r}, "
                f"{tokens / held:.3g} epochs of its {held:,}, and max_epochs is "
                f"{allowed.max_epochs:g}; {missing:,.0f} tokens are missing: add text, lower "
                f"the source's weight, or train for fewer tokens."
            )


def describe_sources(
    config: Config, sources: Sequence[Source], phases: Sequence[Phase]
) -> list[str]:
    """Returns a line for each source of a mixture, and for each packed source."""
    if len(sources) == 1 and config.data.packing == "joined":
        return []
    order = data_order(sources, config.seed, phases)
    last = phases[-1].end.examples
    read = zip(sources, tokens_read(order, last), epochs_read(order, last), strict=True)
    return [
        f"source {source.name}: the run reads {short(int(tokens))} tokens, {epochs:.3g} epochs"
        f"{_describe_padding(source)}"
        for source, tokens, epochs in read
    ]


def _describe_padding(source: Source) -> str:
    if isinstance(source, PackedSource):
        return f", {100 * source.padding_share:.2g} % padding"
    return ""
