"""The input pipeline: batches in an order determined by seed and example index alone.

Shapes: A microbatches per step, B rows in this process, T tokens.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags

from stackjax.data import packing
from stackjax.data.batch import Batch
from stackjax.data.config import DataConfig
from stackjax.data.open import Source
from stackjax.data.order import Order, find, length_at
from stackjax.data.packed_source import PackedSource
from stackjax.data.sources import TokenSource
from stackjax.runtime.errors import UserError

Rows = slice | np.ndarray


def train_batches(
    sources: Sequence[Source],
    config: DataConfig,
    order: Order,
    *,
    first_example: int,
    batch_size: int,
    accumulate: int,
    rows: Rows,
    num_batches: int = sys.maxsize,
) -> Iterator[Batch]:
    """Returns an iterator over batches [A, B, T], all in one segment of the order.

    Row b of microbatch a in step s is example `first_example + s * batch_size +
    a * (batch_size // accumulate) + b` of the order.

    Args:
      first_example: Examples consumed so far, in all stages.
      rows: This process's rows of each microbatch.
    """
    if batch_size % accumulate:
        raise UserError(f"accumulate {accumulate} does not divide batch_size {batch_size}.")
    rows_AB = np.arange(batch_size).reshape(accumulate, -1)[:, rows]
    seq_len = length_at(order, first_example)
    sources = [source.with_length(seq_len) for source in sources]
    read = functools.partial(
        _read_train, sources, config, order, first_example + rows_AB, batch_size
    )
    return _report_killed(iter(_prefetch(num_batches, read, config, config.num_workers)))


def eval_batches(
    source: TokenSource,
    config: DataConfig,
    *,
    num_sequences: int,
    batch_size: int,
    rows: Rows,
    first_position: int = 0,
) -> Iterator[Batch]:
    """Returns an iterator over fixed sequences, spread evenly over the split, [1, B, T].

    The last batch is padded with sequences whose loss weights are 0.

    Args:
      rows: This process's rows of each batch.
      first_position: Predictions from earlier positions have loss weight 0.

    Raises:
      UserError: The split has fewer than `num_sequences` sequences.
    """
    if not 1 <= num_sequences <= len(source):
        raise UserError(
            f"evaluation.num_sequences is {num_sequences}; the split {source.split!r} of "
            f"{source.path!r} has {len(source)} sequences of {source.seq_len} tokens."
        )
    chosen = np.arange(num_sequences) * len(source) // num_sequences
    padded = np.full(-(-num_sequences // batch_size) * batch_size, -1)
    padded[:num_sequences] = chosen
    chosen_NB = padded.reshape(-1, batch_size)[:, rows]
    read = functools.partial(_read_eval, source, config, chosen_NB, first_position)
    return iter(_prefetch(len(chosen_NB), read, config, num_workers=0))


def _prefetch(
    num_batches: int,
    read: Callable[[int], Batch],
    config: DataConfig,
    num_workers: int,
) -> grain.IterDataset:
    """Returns a Grain dataset with the batches 0, 1, ..., prefetched."""
    options = grain.ReadOptions(
        num_threads=max(1, config.prefetch), prefetch_buffer_size=config.prefetch
    )
    batches = grain.MapDataset.range(num_batches).map(read).to_iter_dataset(options)
    if num_workers == 0:
        return batches
    if not flags.FLAGS.is_parsed():  # Grain workers read absl flags.
        flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=max(1, config.prefetch)
    )
    # Copy out of shared memory, to avoid warnings after the worker has ended.
    return batches.mp_prefetch(workers).map(_copied)


def _report_killed(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields the batches; raises OSError if a worker process was killed.

    Grain passes other errors in a worker through.
    """
    try:
        yield from batches
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise OSError(
            f"a data worker process was killed, perhaps for lack of memory; try a smaller "
            f"data.num_workers or data.prefetch. ({error})"
        ) from error


def _copied(batch: Batch) -> Batch:
    return Batch(*(None if field is None else np.array(field) for field in batch))


def _read_train(
    sources: Sequence[Source],
    config: DataConfig,
    order: Order,
    first_AB: np.ndarray,
    batch_size: int,
    step: int,
) -> Batch:
    examples_AB = first_AB + step * batch_size
    places = find(order, examples_AB.ravel())
    shape = (*examples_AB.shape, sources[0].seq_len)
    tokens_KT = np.empty((examples_AB.size, shape[-1]), np.int32)
    segments_KT = np.zeros_like(tokens_KT)
    for row, (index, sequence) in enumerate(zip(*places, strict=True)):
        source = sources[index]
        if isinstance(source, PackedSource):
            tokens_KT[row], segments_KT[row] = source[int(sequence)]
        else:
            tokens_KT[row] = source[int(sequence)]
    if config.packing == "joined" and config.mask_documents:
        segments_KT = packing.segments(tokens_KT, sources[0].manifest.tokenizer.end_id)
    return _build_batch(tokens_KT.reshape(shape), segments_KT.reshape(shape), config)


def _read_eval(
    source: TokenSource,
    config: DataConfig,
    chosen_NB: np.ndarray,
    first_position: int,
    step: int,
) -> Batch:
    index_B = chosen_NB[step]
    tokens_ABT = np.stack([source[max(int(index), 0)] for index in index_B])[None]
    segments_ABT = packing.segments(tokens_ABT, source.manifest.tokenizer.end_id)
    batch = _build_batch(tokens_ABT, segments_ABT, config)
    batch.loss_weights[:, index_B < 0] = 0.0
    batch.loss_weights[..., :first_position] = 0.0
    return batch


def _build_batch(tokens_ABT: np.ndarray, segments_ABT: np.ndarray, config: DataConfig) -> Batch:
    """Returns the batch with these tokens, from these documents."""
    if not config.mask_documents:
        segments_ABT = packing.without_borders(segments_ABT)
    return Batch(
        tokens=tokens_ABT,
        positions=packing.positions(segments_ABT),
        segments=segments_ABT if config.mask_documents else None,
        loss_weights=packing.loss_weights(segments_ABT),
    )
