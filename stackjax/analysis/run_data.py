"""The data that a run reads: epochs by source, and the first examples of the order."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from stackjax.config import Config
from stackjax.data import packing
from stackjax.data.manifest import MANIFEST
from stackjax.data.open import Source
from stackjax.data.order import Order, find, length_at, tokens_read
from stackjax.data.packed_source import PackedSource
from stackjax.data.token_lines import visible
from stackjax.run.validation import open_data
from stackjax.tokenizer.token_bytes import TokenBytes, token_bytes
from stackjax.tokenizer.tokenizer_info import stored_tokenizer
from stackjax.training.batches import data_order
from stackjax.training.expand import expand
from stackjax.training.phase import Phase

NUM_EXAMPLES = 100
"""Examples to show, from the start of the order."""
_SHOWN_TOKENS = 64
_SHOWN_CHARACTERS = 56


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageData:
    """The data of a stage, as planned."""

    stage: int
    seq_len: int
    """Tokens per example."""
    examples: int
    tokens: int
    epochs: tuple[float, ...]
    """Epochs of each source in this stage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceData:
    """A source of a run."""

    name: str
    path: str
    tokens: int
    """Tokens in an epoch: complete sequences of the run's longest length."""
    tokens_read: int
    """Tokens that the run reads."""
    epochs: float
    """Epochs that the run reads."""
    max_epochs: float | None
    """The config's limit."""
    padding_share: float | None
    """Share of padding in packed sequences; None for a joined stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplePlace:
    """An example and its place in a source."""

    example: int
    """Number in the run's order."""
    source: str
    sequence: int
    """Number among the source's sequences of this length."""
    seq_len: int
    text: str
    """The beginning, printable."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run."""

    packing: str
    stages: tuple[StageData, ...]
    sources: tuple[SourceData, ...]
    examples: tuple[ExamplePlace, ...]


def read_run_data(config: Config) -> RunData:
    """Returns the data that a new run with this config reads.

    Raises:
      UserError: The config is wrong, or a source is missing or damaged.
      OSError: A source cannot be read.
    """
    phases = expand(config)
    sources, _ = open_data(config)
    order = data_order(sources, config.seed, phases)
    return RunData(
        packing=config.data.packing,
        stages=tuple(_stages(order, phases)),
        sources=tuple(_sources(config, sources, order, phases[-1].end.examples)),
        examples=tuple(_examples(sources, order, phases[-1].end.examples)),
    )


def _stages(order: Order, phases: Sequence[Phase]) -> Iterator[StageData]:
    for stage, group in itertools.groupby(phases, lambda phase: phase.stage):
        first, *_, last = list(group) * 2
        start, end = first.start, last.end
        read_S = tokens_read(order, end.examples) - tokens_read(order, start.examples)
        yield StageData(
            stage=stage,
            seq_len=first.seq_len,
            examples=end.examples - start.examples,
            tokens=end.tokens - start.tokens,
            epochs=tuple((read_S / order.epoch_tokens).tolist()),
        )


def _sources(
    config: Config, sources: Sequence[Source], order: Order, num_examples: int
) -> Iterator[SourceData]:
    held_S, read_S = order.epoch_tokens.tolist(), tokens_read(order, num_examples).tolist()
    listed = zip(sources, config.data.all_sources, held_S, read_S, strict=True)
    for source, settings, held, read in listed:
        is_packed = isinstance(source, PackedSource)
        yield SourceData(
            name=source.name,
            path=settings.path,
            tokens=held,
            tokens_read=read,
            epochs=read / held,
            max_epochs=settings.max_epochs,
            padding_share=source.padding_share if is_packed else None,
        )


def _examples(
    sources: Sequence[Source], order: Order, num_examples: int
) -> Iterator[ExamplePlace]:
    info = sources[0].manifest.tokenizer
    directory = epath.Path(sources[0].path)
    bytes_of = token_bytes(stored_tokenizer(directory, info, str(directory / MANIFEST)))
    shown = range(min(NUM_EXAMPLES, num_examples))
    for _, group in itertools.groupby(shown, lambda example: _segment(order, example)):
        examples = list(group)
        seq_len = length_at(order, examples[0])
        cut = [source.with_length(seq_len) for source in sources]
        places = find(order, np.array(examples))
        for example, index, sequence in zip(examples, *places, strict=True):
            yield ExamplePlace(
                example=example,
                source=sources[index].name,
                sequence=int(sequence),
                seq_len=seq_len,
                text=_beginning(cut[index], int(sequence), bytes_of),
            )


def _segment(order: Order, example: int) -> int:
    """Returns the last example before or at this one with which a segment begins."""
    return max(s.first_example for s in order.segments if s.first_example <= example)


def _beginning(source: Source, sequence: int, bytes_of: TokenBytes) -> str:
    """Returns the beginning of a sequence, printable."""
    tokens = source[sequence]
    if isinstance(tokens, tuple):
        tokens_T, segments_T = tokens
        tokens = tokens_T[segments_T != packing.PADDING]
    data = b"".join(map(bytes_of, tokens[:_SHOWN_TOKENS].tolist()))
    return visible(data)[:_SHOWN_CHARACTERS]
