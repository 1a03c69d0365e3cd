"""Sequences of whole documents: tokens, segments, batches, workers and damage."""

import gc
import itertools
import pickle
import subprocess
import sys
import tempfile
from concurrent import futures
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from absl import flags
from conftest import random_params, tiny_model

from stackjax.data import best_fit, packing
from stackjax.data.batch import Batch
from stackjax.data.manifest import Manifest, Split, write_manifest
from stackjax.data.packed_source import PackedSource
from stackjax.data.shards import ShardWriter
from stackjax.data.sources import TokenSource
from stackjax.model.loss import next_token_loss
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer_info import TokenizerInfo

T = 32
END = 0
VOCAB_SIZE = 11


def write_set(path: Path, lengths: np.ndarray) -> np.ndarray:
    """Writes random documents in three shards, and returns the stream."""
    rng = np.random.default_rng(0)
    path.mkdir(exist_ok=True)
    shards, stream = [], []
    for index, part in enumerate(np.array_split(lengths, 3)):
        writer = ShardWriter(path / f"train-{index}", "uint16")
        for length in part:
            document = rng.integers(1, VOCAB_SIZE, length)
            document[-1] = END
            writer.write(document)
            stream.append(document)
        shards.append(writer.close())
    info = TokenizerInfo(name="bytes", digest="0", vocab_size=VOCAB_SIZE, end_id=END)
    split = Split(tokens=int(lengths.sum()), documents=len(lengths), shards=tuple(shards))
    write_manifest(str(path), Manifest(tokenizer=info, dtype="uint16", splits={"train": split}))
    return np.concatenate(stream)


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 2 * T, 300)


@pytest.fixture(scope="module")
def written(tmp_path_factory, lengths) -> tuple[str, np.ndarray]:
    path = tmp_path_factory.mktemp("set")
    return str(path), write_set(path, lengths)


@pytest.fixture(scope="module")
def source(written) -> PackedSource:
    return PackedSource(TokenSource(written[0], "train", T))


@pytest.fixture(scope="module")
def sequences(source) -> tuple[np.ndarray, np.ndarray]:
    """All tokens and segments, int32 [K, T]."""
    tokens, segments = zip(*(source[k] for k in range(len(source))), strict=True)
    return np.stack(tokens), np.stack(segments)


def build_batch(source: PackedSource, index_AB: np.ndarray, mask_documents: bool) -> Batch:
    """Returns the batch with the sequences at the given indices."""
    read = [source[int(index)] for index in index_AB.ravel()]
    shape = (*index_AB.shape, source.seq_len)
    tokens, segments = (np.stack(field).reshape(shape) for field in zip(*read, strict=True))
    parts = segments if mask_documents else packing.without_borders(segments)
    return Batch(
        tokens=tokens,
        positions=packing.positions(parts),
        segments=parts if mask_documents else None,
        loss_weights=packing.loss_weights(parts),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["joined", "masked"])
def epoch(request, source) -> Batch:
    """All sequences, with and without document masks."""
    return build_batch(source, np.arange(len(source))[None], request.param)


def test_sequences_follow_the_plan(written, source, sequences, lengths):
    plan = best_fit.plan(lengths, T)
    stream = written[1]
    assert len(source) == plan.num_sequences
    assert source.padding_share == plan.padding_share
    for tokens, segments, (start, stop) in zip(
        *sequences, itertools.pairwise(plan.starts), strict=True
    ):
        assert tokens.dtype == segments.dtype == np.int32
        pieces = list(zip(plan.offsets[start:stop], plan.lengths[start:stop], strict=True))
        expected = [stream[offset : offset + length] for offset, length in pieces]
        numbers = np.repeat(np.arange(len(pieces)), [len(piece) for piece in expected])
        rest = T - len(numbers)
        assert tokens.tolist() == [*np.concatenate(expected), *[END] * rest]
        assert segments.tolist() == [*numbers, *[packing.PADDING] * rest]


def test_batches_have_the_documented_shapes_and_dtypes(source):
    batch = build_batch(source, np.arange(6).reshape(2, 3), mask_documents=True)
    for field, dtype in zip(batch, (np.int32, np.int32, np.int32, np.float32), strict=True):
        assert field.shape == (2, 3, T)
        assert field.dtype == dtype


def test_padding_is_no_target_and_predicts_nothing(epoch, sequences):
    is_padding = sequences[1][None] == packing.PADDING
    assert is_padding.any()
    assert not epoch.loss_weights[is_padding].any()
    assert not epoch.loss_weights[..., :-1][is_padding[..., 1:]].any()


def test_every_token_is_predicted_once_in_an_epoch(epoch, lengths):
    # The first token after a border has no prediction: of a sequence, or of each piece.
    plan = best_fit.plan(lengths, T)
    firsts = plan.num_sequences if epoch.segments is None else len(plan.lengths)
    assert epoch.loss_weights.sum() == lengths.sum() - firsts


def test_predictions_across_documents_are_those_of_joined_documents(epoch, sequences):
    segments = sequences[1]
    is_border = (segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] != packing.PADDING)
    assert is_border.any()
    weights = epoch.loss_weights[0, :, :-1][is_border]
    assert np.all(weights == (epoch.segments is None))


def test_positions_restart_only_with_masks(epoch, sequences):
    segments = sequences[1]
    positions = epoch.positions[0]
    is_token = segments != packing.PADDING
    if epoch.segments is None:
        assert np.array_equal(positions[is_token], np.nonzero(is_token)[1])
    else:
        is_first = np.diff(segments, axis=-1, prepend=-2) != 0
        assert not positions[is_first].any()
        assert np.all(np.diff(positions, axis=-1)[~is_first[:, 1:]] == 1)


def test_padding_changes_neither_loss_nor_gradient(epoch, sequences):
    config = tiny_model(num_layers=2)
    params = random_params(config)
    rows = np.flatnonzero((sequences[1] == packing.PADDING).any(-1))[-4:]
    batch = jax.tree.map(lambda field: field[:, rows], epoch)
    is_padding = sequences[1][rows][None] == packing.PADDING
    other = batch._replace(
        tokens=np.where(is_padding, 7, batch.tokens),
        positions=np.where(is_padding, 3, batch.positions),
    )

    @jax.jit
    def loss_and_gradient(batch):
        batch = jax.tree.map(lambda field: field[0], batch)
        return jax.value_and_grad(lambda p: next_token_loss(config, p, batch).objective)(params)

    for one, two in zip(
        *(jax.tree.leaves(loss_and_gradient(each)) for each in (batch, other)), strict=True
    ):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, two)


def test_order_is_deterministic(written, source, sequences):
    again = PackedSource(TokenSource(written[0], "train", T))
    assert len(again) == len(source)
    for index in (0, 1, len(source) // 2, len(source) - 1):
        assert np.array_equal(again[index][0], sequences[0][index])
        assert np.array_equal(again[index][1], sequences[1][index])


def test_index_out_of_range_is_refused(source):
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="outside"):
            source[index]


def test_threads_read_equal_sequences(source, sequences):
    with futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.__getitem__, [*range(len(source))] * 3))
    tokens, segments = map(np.stack, zip(*found, strict=True))
    assert np.array_equal(tokens, np.tile(sequences[0], (3, 1)))
    assert np.array_equal(segments, np.tile(sequences[1], (3, 1)))


def test_pickled_source_reads_equal_sequences(source, sequences):
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source)
    assert copy.padding_share == source.padding_share
    for index in range(len(source)):
        assert np.array_equal(copy[index], source[index])
    del copy
    gc.collect()
    assert np.array_equal(source[0][0], sequences[0][0])


@pytest.mark.slow
def test_workers_read_equal_sequences(source, sequences):
    if not flags.FLAGS.is_parsed():  # Grain workers read absl flags.
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(source).map(np.stack).to_iter_dataset()
    workers = grain.MultiprocessingOptions(num_workers=2, per_worker_buffer_size=1)
    found = np.stack([np.array(pair) for pair in dataset.mp_prefetch(workers)], axis=1)
    assert np.array_equal(found, sequences)


def test_pickle_has_no_plan(tmp_path):
    write_set(tmp_path / "few", np.full(30, 4))
    write_set(tmp_path / "many", np.full(3000, 4))
    few, many = (
        pickle.dumps(PackedSource(TokenSource(str(tmp_path / name), "train", T)))
        for name in ("few", "many")
    )
    assert abs(len(many) - len(few)) < 100


def test_plan_is_removed_with_the_source(tmp_path, monkeypatch, written):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = PackedSource(TokenSource(written[0], "train", T))
    assert len(list(tmp_path.iterdir())) == 1
    del source
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_plan_is_removed_at_exit(tmp_path, written):
    script = (
        "import sys\n"
        "from stackjax.data.packed_source import PackedSource\n"
        "from stackjax.data.sources import TokenSource\n"
        f"source = PackedSource(TokenSource({written[0]!r}, 'train', {T}))\n"
        "print(len(source))\n"
    )
    environment = {"TMPDIR": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0
    assert not list(tmp_path.iterdir())


def test_damaged_lengths_are_refused(tmp_path):
    write_set(tmp_path / "set", np.arange(1, 60))
    opened = TokenSource(str(tmp_path / "set"), "train", T)
    file = tmp_path / "set" / "train-1.lengths"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"train-1.lengths' has other lengths .*again"):
        PackedSource(opened)
