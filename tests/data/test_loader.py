"""Train and evaluation batches: order, packing, processes and errors."""

import dataclasses
import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from stackjax.data import manifest as manifests
from stackjax.data.batch import Batch
from stackjax.data.config import DataConfig
from stackjax.data.loader import eval_batches, train_batches
from stackjax.data.manifest import Manifest, Split
from stackjax.data.mixture import Mixture
from stackjax.data.open import open_sources
from stackjax.data.order import Order, Segment
from stackjax.data.shards import ShardWriter
from stackjax.data.sources import TokenSource
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer_info import TokenizerInfo

T = 16
NUM_SEQUENCES = 37
ALL = slice(None)


def write_set(path: Path) -> None:
    """Writes two shards per split; the first token is the sequence index."""
    tokenizer = TokenizerInfo(name="bytes", digest="0", vocab_size=256, end_id=0)
    stream = np.random.default_rng(0).integers(0, 9, NUM_SEQUENCES * T + 3)
    stream[: NUM_SEQUENCES * T : T] = 100 + np.arange(NUM_SEQUENCES)
    splits = {}
    for name in manifests.SPLITS:
        shards = []
        for index, tokens in enumerate(np.split(stream, [301])):
            writer = ShardWriter(path / f"{name}-{index}.array_record", "uint16")
            writer.write(tokens)
            shards.append(writer.close())
        splits[name] = Split(tokens=len(stream), documents=2, shards=tuple(shards))
    manifest = Manifest(tokenizer=tokenizer, dtype="uint16", splits=splits)
    manifests.write_manifest(str(path), manifest)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    path = tmp_path_factory.mktemp("set")
    write_set(path)
    # No prefetch: Grain's shuffle is slow for so few sequences.
    return DataConfig(path=str(path), seq_len=T, prefetch=0)


@pytest.fixture(scope="module")
def source(config) -> TokenSource:
    return open_source(config, "train", 256)


@pytest.fixture(scope="module")
def order(source, config) -> np.ndarray:
    """Sequence indices in the order read, for five epochs."""
    return sequences(take(source, config, 5, batch_size=NUM_SEQUENCES)).ravel()


def open_source(config, split, vocab_size) -> TokenSource:
    """Returns the only source."""
    (source,) = open_sources(config, split, vocab_size)
    return source


def order_of(source, seed=0) -> Order:
    """Returns the order of a run with one source and one length."""
    segment = Segment(first_example=0, seq_len=source.seq_len, mixture=Mixture(weights=(1.0,)))
    return Order(
        seed=seed,
        chunk_len=source.seq_len,
        num_chunks=(len(source),),
        segments=(segment,),
    )


def take(source, config, num_batches, seed=0, **kwargs) -> Batch:
    """Returns train batches stacked along a new first axis."""
    options = dict(first_example=0, batch_size=8, accumulate=1, rows=ALL)
    order = order_of(source, seed)
    batches = train_batches((source,), config, order, **(options | kwargs))
    return stack(itertools.islice(batches, num_batches))


def stack(batches) -> Batch:
    return jax.tree.map(lambda *fields: np.stack(fields), *batches)


def sequences(batch: Batch) -> np.ndarray:
    """Returns each row's sequence index."""
    return batch.tokens[..., 0] - 100


def assert_equal(a: Batch, b: Batch | list) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(x, y)


def test_batches_have_the_documented_shapes_and_dtypes(source, config):
    config = dataclasses.replace(config, mask_documents=True)
    batch = take(source, config, 1, batch_size=6, accumulate=2)
    for field, dtype in zip(batch, (np.int32, np.int32, np.int32, np.float32), strict=True):
        assert field.shape == (1, 2, 3, T)
        assert field.dtype == dtype


def test_without_document_masks_there_are_no_segments(source, config):
    batch = take(source, config, 2)
    assert np.all(batch.positions == np.arange(T))
    assert batch.segments is None
    assert np.all(batch.loss_weights[..., :-1] == 1)
    assert not batch.loss_weights[..., -1].any()


def test_with_document_masks_end_tokens_have_weight_zero(source, config):
    masked = dataclasses.replace(config, mask_documents=True)
    batch = take(source, masked, 5)
    assert np.array_equal(batch.tokens, take(source, config, 5).tokens)
    is_end = batch.tokens == 0
    assert is_end.any()
    assert not batch.loss_weights[is_end].any()
    assert np.all(batch.loss_weights[..., :-1][~is_end[..., :-1]] == 1)
    after_end = is_end[..., :-1]
    assert not batch.positions[..., 1:][after_end].any()
    assert np.all(np.diff(batch.segments, axis=-1) == after_end)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_each_epoch_visits_every_sequence_once_in_a_new_order(source, config, seed):
    batch = take(source, config, 3, seed=seed, batch_size=NUM_SEQUENCES)
    epochs = sequences(batch).reshape(3, -1)
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_SEQUENCES))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert tuple(epochs[0]) != tuple(range(NUM_SEQUENCES))


def test_seed_changes_the_order_of_every_epoch(source, config):
    epochs = [
        sequences(take(source, config, 4, seed=seed, batch_size=NUM_SEQUENCES))
        for seed in range(4)
    ]
    orders = {tuple(order) for order in np.concatenate(epochs).reshape(16, -1)}
    assert len(orders) == 16


@hypothesis.given(
    first=st.integers(0, 3 * NUM_SEQUENCES),
    accumulate=st.integers(1, 3),
    micro=st.integers(1, 5),
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_batch_size_and_start_do_not_change_the_stream(
    source, config, order, first, accumulate, micro
):
    num_batches, batch_size = 3, accumulate * micro
    part = take(
        source,
        config,
        num_batches,
        first_example=first,
        batch_size=batch_size,
        accumulate=accumulate,
    )
    expected = order[first : first + num_batches * batch_size]
    assert np.array_equal(sequences(part).ravel(), expected)


def test_distant_start_takes_constant_time(source, config):
    start = time.perf_counter()
    take(source, config, 1, first_example=10**12)
    assert time.perf_counter() - start < 5


@hypothesis.given(st.permutations(range(6)), st.integers(1, 5))
@hypothesis.settings(max_examples=8, deadline=None)
def test_rows_of_a_process_are_rows_of_the_whole_batch(source, config, rows, cut):
    """Two processes with any rows read the same batch as a single process."""
    options = dict(batch_size=12, accumulate=2, first_example=31)
    whole = take(source, config, 3, **options)
    for share in (np.array(rows[:cut]), np.array(rows[cut:]), slice(cut, None)):
        part = take(source, config, 3, **options, rows=share)
        expected = [field[:, :, share] for field in jax.tree.leaves(whole)]
        assert_equal(part, expected)


@pytest.mark.parametrize("changes", [{"prefetch": 1}, {"prefetch": 4}])
def test_prefetch_does_not_change_batches(source, config, changes):
    other = dataclasses.replace(config, **changes)
    assert_equal(take(source, config, 20), take(source, other, 20))


def test_worker_processes_do_not_change_batches(source, config):
    workers = dataclasses.replace(config, num_workers=2)
    assert_equal(take(source, config, 7), take(source, workers, 7))


@pytest.mark.parametrize("rows", [slice(0, 3), np.array([4, 0])])
def test_rows_may_be_a_slice_or_indices(source, config, rows):
    whole = sequences(take(source, config, 1, batch_size=5))
    part = sequences(take(source, config, 1, batch_size=5, rows=rows))
    assert np.array_equal(part, whole[..., rows])


def test_accumulate_must_divide_the_batch(source, config):
    with pytest.raises(ValueError, match="accumulate 3 does not divide batch_size 8"):
        take(source, config, 1, accumulate=3)


def held_out(source, config, num_sequences, batch_size=4, rows=ALL) -> Batch:
    return stack(
        eval_batches(
            source,
            config,
            num_sequences=num_sequences,
            batch_size=batch_size,
            rows=rows,
        )
    )


@pytest.mark.parametrize("num_sequences", [1, 4, 9, NUM_SEQUENCES])
def test_evaluation_reads_fixed_sequences_spread_over_the_split(source, config, num_sequences):
    batch = held_out(source, config, num_sequences)
    assert batch.tokens.shape[1:] == (1, 4, T)
    assert len(batch.tokens) == -(-num_sequences // 4)
    counted = batch.loss_weights.any(-1).ravel()
    assert counted[:num_sequences].all() and not counted[num_sequences:].any()
    chosen = sequences(batch).ravel()[:num_sequences]
    assert len(set(chosen)) == num_sequences
    if num_sequences > 1:
        gaps = np.diff([*chosen, NUM_SEQUENCES])
        assert gaps.max() - gaps.min() <= 1
    assert_equal(batch, held_out(source, config, num_sequences))


@pytest.mark.parametrize("cut", [1, 3])
def test_evaluation_rows_of_all_processes_make_up_the_batch(source, config, cut):
    whole = held_out(source, config, 10)
    parts = [
        held_out(source, config, 10, rows=rows) for rows in (slice(0, cut), np.arange(cut, 4))
    ]
    joined = jax.tree.map(lambda *pair: np.concatenate(pair, 2), *parts)
    assert_equal(joined, whole)


@pytest.mark.parametrize("num_sequences", [0, NUM_SEQUENCES + 1])
def test_too_many_evaluation_sequences_are_refused(source, config, num_sequences):
    with pytest.raises(ValueError, match=r"evaluation.num_sequences is .* 37 sequences"):
        held_out(source, config, num_sequences)


def test_threads_end_with_the_iterator(source, config):
    config = dataclasses.replace(config, prefetch=4)
    batches = train_batches(
        (source,),
        config,
        order_of(source),
        first_example=0,
        batch_size=8,
        accumulate=1,
        rows=ALL,
    )
    before = threading.active_count()
    next(batches)
    assert threading.active_count() > before
    del batches
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_too_small_vocabulary_is_refused(config):
    with pytest.raises(ValueError, match=r"100.* 256 .*--model.vocab-size 256"):
        open_source(config, "train", 100)
    assert len(open_source(config, "train", 257)) == NUM_SEQUENCES


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_record_is_named(tmp_path, num_workers):
    write_set(tmp_path)
    config = DataConfig(path=str(tmp_path), seq_len=T, num_workers=num_workers, prefetch=2)
    source = open_source(config, "train", 256)
    file = tmp_path / "train-1.array_record"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match=r"record 0 of shard .*train-1.* damaged"):
        take(source, config, 9)


class KillingSource(TokenSource):
    """Kills the process that reads the last sequence."""

    def __getitem__(self, index: int) -> np.ndarray:
        if index == len(self) - 1:
            os._exit(1)
        return super().__getitem__(index)


def test_killed_worker_is_one_line(config):
    source = KillingSource(config.path, "train", T)
    config = dataclasses.replace(config, num_workers=1)
    with pytest.raises(OSError, match=r"data worker process was killed"):
        take(source, config, 9)


def test_token_outside_the_vocabulary_is_refused(tmp_path):
    write_set(tmp_path)
    manifest = manifests.read_manifest(str(tmp_path))
    small = dataclasses.replace(manifest.tokenizer, vocab_size=9)
    manifests.write_manifest(str(tmp_path), dataclasses.replace(manifest, tokenizer=small))
    config = DataConfig(path=str(tmp_path), seq_len=T)
    with pytest.raises(OSError, match=r"it has token 136, but the vocabulary has 9 tokens"):
        take(open_source(config, "train", 9), config, 9)


@pytest.fixture
def library(tmp_path) -> str:
    """A standard library with 100 modules."""
    root = tmp_path / "lib"
    root.mkdir()
    for index in range(100):
        (root / f"module_{index}.py").write_text(f"x = {index}\n" * 9)
    return str(root)


def test_builtin_corpus_is_prepared_on_first_use(tmp_path, library, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: library)
    path = tmp_path / "data" / "stdlib"
    config = DataConfig(path=str(path), seq_len=T)
    with pytest.raises(ValueError, match="python -m stackjax"):
        open_source(config, "train", 256)
    config = dataclasses.replace(config, corpus="stdlib")
    validation = open_source(config, "validation", 256)
    written = (path / manifests.MANIFEST).stat().st_mtime_ns
    train = open_source(config, "train", 256)
    assert (path / manifests.MANIFEST).stat().st_mtime_ns == written
    assert train[0].astype(np.uint8).tobytes() == b"x = 0\n" * 2 + b"x = "
    assert len(validation) > 0
    assert [p.name for p in path.parent.iterdir()] == ["stdlib"]


OPEN = """
import sys
from stackjax.config import DataConfig
from stackjax.data.open import open_sources
import sysconfig
sysconfig.get_path = lambda name: sys.argv[1]
config = DataConfig(path=sys.argv[2], seq_len=16, corpus="stdlib")
print(open_sources(config, "train", 256)[0].manifest.digest)
"""


def test_simultaneous_processes_prepare_the_corpus_once(tmp_path, library):
    path = tmp_path / "data" / "stdlib"
    command = [sys.executable, "-c", OPEN, library, str(path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs, errors = zip(*(process.communicate(timeout=200) for process in both), strict=True)
    assert errors == ("", "")
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("100 % of" in output for output in outputs) == 1
    assert [p.name for p in path.parent.iterdir()] == ["stdlib"]


def test_source_in_use_can_be_pickled(source, config):
    copy = pickle.loads(pickle.dumps(source))
    assert_equal(take(source, config, 2), take(copy, config, 2))


@pytest.mark.parametrize("cache_dir", ["gs://bucket/cache", "foo://x"])
def test_cache_in_a_bucket_is_refused(config, cache_dir):
    config = dataclasses.replace(config, cache_dir=cache_dir)
    with pytest.raises(UserError, match=rf"data.cache_dir is {cache_dir}"):
        open_source(config, "train", 256)
