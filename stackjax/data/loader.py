"""The input pipeline: batches in an order determined by seed and example index alone.

Shapes: A microbatches per step, B rows in this process, T tokens.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags
from etils import epath

from stackjax.data import packing
from stackjax.data.batch import Batch
from stackjax.data.cache import local_copy
from stackjax.data.config import DataConfig, PrepareConfig
from stackjax.data.manifest import MANIFEST, SplitName
from stackjax.data.prepare import prepare
from stackjax.data.sources import TokenSource
from stackjax.files.storage import check_bucket, is_remote
from stackjax.runtime.errors import UserError

Rows = slice | np.ndarray


def open_source(config: DataConfig, split: SplitName, vocab_size: int) -> TokenSource:
    """Returns a split's sequences; prepares the built-in corpus if missing.

    Args:
      vocab_size: The model's vocabulary size.

    Raises:
      UserError: The data set is missing or damaged, or has a larger vocabulary than the model.
      OSError: The bucket is not usable, or copying to the cache failed.
    """
    check_bucket(config.path)
    missing = not (epath.Path(config.path) / MANIFEST).exists()
    if config.corpus == "stdlib" and missing:
        # Another process may have prepared the same set in the meantime.
        with contextlib.suppress(FileExistsError):
            prepare(
                PrepareConfig(
                    paths=("tfds:stackjax_stdlib", config.path),
                    tokenizer="bytes",
                    num_processes=1,
                )
            )
    path, remedy = config.path, None
    if config.cache_dir is not None:
        path = local_copy(path, split, config.cache_dir)
        remedy = f"remove {path!r} to copy it again from {config.path!r}"
    elif is_remote(path) and not path.startswith("gs://"):
        raise UserError(
            f"data.path is {path}, but shards are read only from disks and gs://; give "
            f"--data.cache-dir DIRECTORY to copy them to a disk first."
        )
    source = TokenSource(path, split, config.seq_len, remedy=remedy)
    tokenizer = source.manifest.tokenizer
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but the tokenizer {tokenizer.name!r} of "
            f"{config.path!r} has {tokenizer.vocab_size} tokens; "
            f"give --model.vocab-size {tokenizer.vocab_size}."
        )
    return source


def train_batches(
    source: TokenSource,
    config: DataConfig,
    *,
    seed: int,
    first_example: int,
    batch_size: int,
    accumulate: int,
    rows: Rows,
) -> Iterator[Batch]:
    """Returns an endless iterator over batches [A, B, T], reshuffled every epoch.

    Row b of microbatch a in step s is example `first_example + s * batch_size +
    a * (batch_size // accumulate) + b`. The seed alone maps examples to sequences.

    Args:
      first_example: Examples consumed so far, in all stages.
      rows: This process's rows of each microbatch.
    """
    if batch_size % accumulate:
        raise UserError(f"accumulate {accumulate} does not divide batch_size {batch_size}.")
    rows_AB = np.arange(batch_size).reshape(accumulate, -1)[:, rows]
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    read = functools.partial(
        _read_train, source, config, order, first_example + rows_AB, batch_size
    )
    return _report_killed(iter(_prefetch(sys.maxsize, read, config, config.num_workers)))


def eval_batches(
    source: TokenSource,
    config: DataConfig,
    *,
    num_sequences: int,
    batch_size: int,
    rows: Rows,
) -> Iterator[Batch]:
    """Returns an iterator over fixed sequences, spread evenly over the split, [1, B, T].

    The last batch is padded with sequences whose loss weights are 0.

    Args:
      rows: This process's rows of each batch.

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
    read = functools.partial(_read_eval, source, config, chosen_NB)
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
    source: TokenSource,
    config: DataConfig,
    order: grain.MapDataset,
    first_AB: np.ndarray,
    batch_size: int,
    step: int,
) -> Batch:
    examples_AB = first_AB + step * batch_size
    # Grain's shuffle takes an index in any epoch, and reshuffles every epoch.
    index_AB = [[order[int(k)] for k in examples_B] for examples_B in examples_AB]
    return _build_batch(source, config, np.array(index_AB))


def _read_eval(
    source: TokenSource, config: DataConfig, chosen_NB: np.ndarray, step: int
) -> Batch:
    index_AB = chosen_NB[step][None]
    batch = _build_batch(source, config, np.maximum(index_AB, 0))
    batch.loss_weights[index_AB < 0] = 0.0
    return batch


def _build_batch(source: TokenSource, config: DataConfig, index_AB: np.ndarray) -> Batch:
    """Returns the batch with the sequences at the given indices."""
    tokens = np.empty((*index_AB.shape, source.seq_len), np.int32)
    for where in np.ndindex(index_AB.shape):
        tokens[where] = source[int(index_AB[where])]
    segments = None
    if config.mask_documents:
        segments = packing.segments(tokens, source.manifest.tokenizer.end_id)
    parts = np.zeros_like(tokens) if segments is None else segments
    return Batch(
        tokens=tokens,
        positions=packing.positions(parts),
        segments=segments,
        loss_weights=packing.loss_weights(parts),
    )
