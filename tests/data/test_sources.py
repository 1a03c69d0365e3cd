"""Reading token shards: sequences, damaged files and damaged records."""

import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from stackjax.data.manifest import (
    MANIFEST,
    Manifest,
    Split,
    TokenizerInfo,
    read_manifest,
    sealed,
    write_manifest,
)
from stackjax.data.shards import ShardWriter
from stackjax.data.sources import TokenSource

SHARD_TOKENS = (5000, 1, 2048, 4096, 333)
VOCAB_SIZE = {"uint16": 256, "uint32": 70_000}


def write_set(path: Path, shard_tokens=SHARD_TOKENS, dtype="uint32") -> np.ndarray:
    """Writes random tokens and returns the stream in the split `train`."""
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, VOCAB_SIZE[dtype], length) for length in shard_tokens]
    write_parts(path, parts, dtype)
    return np.concatenate(parts)


def write_parts(path: Path, parts: list[np.ndarray], dtype: str) -> Manifest:
    """Writes a data set with a shard per part."""
    path.mkdir(exist_ok=True)
    shards = []
    for index, tokens in enumerate(parts):
        writer = ShardWriter(path / f"train-{index}.array_record", dtype)
        for document in np.array_split(tokens, min(3, len(tokens))):
            writer.write(document)
        shards.append(writer.close())
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            name="bytes", digest="0", vocab_size=VOCAB_SIZE[dtype], end_id=0
        ),
        dtype=dtype,
        splits={
            "train": Split(
                tokens=sum(map(len, parts)),
                documents=sum(shard.lengths.documents for shard in shards),
                shards=tuple(shards),
            ),
            "validation": Split(tokens=0, documents=0, shards=()),
        },
    )
    write_manifest(str(path), manifest)
    return manifest


@pytest.fixture(scope="module", params=["uint16", "uint32"])
def written(request, tmp_path_factory) -> tuple[str, np.ndarray]:
    path = tmp_path_factory.mktemp("set")
    return str(path), write_set(path, dtype=request.param)


@pytest.fixture
def directory(tmp_path) -> Path:
    write_set(tmp_path / "set")
    return tmp_path / "set"


@hypothesis.given(seq_len=st.integers(1, 11_478), index=st.integers(0, 10**6))
@hypothesis.settings(max_examples=60, deadline=None)
def test_sequence_is_a_slice_of_the_stream(written, seq_len, index):
    path, stream = written
    source = TokenSource(path, "train", seq_len)
    assert len(source) == len(stream) // seq_len
    index %= len(source)
    tokens_T = source[index]
    assert tokens_T.dtype == np.int32
    assert np.array_equal(tokens_T, stream[index * seq_len : (index + 1) * seq_len])


@hypothesis.given(offset=st.integers(0, 11_477), length=st.integers(0, 11_478))
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_range_of_the_stream_can_be_read(written, offset, length):
    path, stream = written
    found = TokenSource(path, "train", 1).read(offset, min(length, len(stream) - offset))
    assert found.dtype == np.int32
    assert np.array_equal(found, stream[offset : offset + length])


def test_index_out_of_range_is_refused(written):
    source = TokenSource(written[0], "train", 100)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="outside"):
            source[index]


def test_pickled_source_reads_equal_sequences(written):
    source = TokenSource(written[0], "train", 3000)
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert all(np.array_equal(copy[k], source[k]) for k in range(len(source)))


def test_manifest_round_trips(directory):
    manifest = read_manifest(str(directory))
    (directory / MANIFEST).unlink()
    write_manifest(str(directory), manifest)
    assert read_manifest(str(directory)) == manifest


def test_missing_data_set_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"python -m stackjax.prepare INPUT\.\.\."):
        TokenSource(str(tmp_path / "absent"), "train", 8)


@pytest.mark.parametrize("seq_len", [sum(SHARD_TOKENS) + 1, 10**9])
def test_split_shorter_than_a_sequence_is_refused(directory, seq_len):
    with pytest.raises(ValueError, match="fewer than one sequence"):
        TokenSource(str(directory), "train", seq_len)


def test_empty_validation_split_names_the_option(directory):
    with pytest.raises(ValueError, match="--validation-fraction"):
        TokenSource(str(directory), "validation", 8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "has 0 bytes"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"bytes, not \d+"),
        (lambda file: file.write_bytes(file.read_bytes()[:65536]), r"bytes, not \d+"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), r"bytes, not \d+"),
        (lambda file: file.write_bytes(bytes(file.stat().st_size)), "readable records"),
        (lambda file: file.write_bytes(other_shard(file.stat().st_size)), "other tokens"),
        (lambda file: flip(file, -65536), "readable records"),
    ],
)
def test_damaged_shard_is_named(directory, damage, message):
    file = directory / "train-3.array_record"
    damage(file)
    with pytest.raises(ValueError, match=message) as error:
        TokenSource(str(directory), "train", 8)
    assert "train-3.array_record'" in str(error.value)
    assert "prepare it again" in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has 11 bytes, not 12"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "has 13 bytes, not 12"),
    ],
)
def test_missing_lengths_are_named(directory, damage, message):
    damage(directory / "train-3.array_record.lengths")
    with pytest.raises(ValueError, match=message) as error:
        TokenSource(str(directory), "train", 8)
    assert "train-3.array_record.lengths'" in str(error.value)
    assert "prepare it again" in str(error.value)


def test_shard_with_other_records_is_refused(directory):
    # ArrayRecord pads files, so the file sizes are equal.
    file = directory / "train-3.array_record"
    size = file.stat().st_size
    writer = ShardWriter(file, "uint32")
    for document in np.zeros((3, 2048), np.int64):
        writer.write(document)
    assert writer.close().bytes == size
    with pytest.raises(ValueError, match="3 readable records, not 2"):
        TokenSource(str(directory), "train", 8)


def other_shard(size: int) -> bytes:
    """Returns a shard with as many tokens and bytes as `train-3`, but other tokens."""
    with tempfile.TemporaryDirectory() as name:
        writer = ShardWriter(Path(name) / "other", "uint32")
        writer.write(np.arange(4096))
        assert writer.close().bytes == size
        return (Path(name) / "other").read_bytes()


def rewrite_manifest(directory: Path, change: Callable[[dict], object]) -> None:
    """Changes fields in a manifest, with a valid checksum."""
    file = directory / MANIFEST
    fields = json.loads(file.read_text())
    del fields["checksum"]
    change(fields)
    file.write_text(sealed(fields))


def test_record_with_another_length_is_refused(tmp_path):
    # Only the first and last record are checked at opening.
    stream = write_set(tmp_path, (3 * 2048,)).astype("<u4")
    file = tmp_path / "train-0.array_record"
    size = file.stat().st_size
    writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    for record in (stream[:2048], stream[:100], stream[4096:]):
        writer.write(record.tobytes())
    writer.close()
    assert file.stat().st_size == size
    source = TokenSource(str(tmp_path), "train", 2048)
    with pytest.raises(OSError, match=r"record 1 of shard .*train-0.* 400 bytes"):
        source[1]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_outside_the_vocabulary_is_refused_while_reading(tmp_path, dtype):
    stream = write_set(tmp_path, (2048, 2048), dtype)
    top = int(stream[2048:].max())
    rewrite_manifest(tmp_path, lambda fields: fields["tokenizer"].update(vocab_size=top))
    source = TokenSource(str(tmp_path), "train", 4096)
    with pytest.raises(OSError, match=r"record 0 of shard .*train-\d.* token \d+") as error:
        source[0]
    assert f"the vocabulary has {top} tokens" in str(error.value)


def test_token_beyond_int32_is_refused(tmp_path):
    write_parts(tmp_path, [np.array([1, 2**31 + 5, 3])], "uint32")
    with pytest.raises(OSError, match=f"token {2**31 + 5}, but the vocabulary has 70000"):
        TokenSource(str(tmp_path), "train", 3)[0]


def flip(file: Path, offset: int) -> None:
    """Flips a bit in a file."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x10
    file.write_bytes(data)


def test_flipped_bit_is_reported_with_the_record(directory):
    flip(directory / "train-0.array_record", 12_000)
    source = TokenSource(str(directory), "train", 2048)
    with pytest.raises(OSError, match=r"record 1 of shard .*train-0.*damaged") as error:
        source[1]
    assert "prepare it again" in str(error.value)
    assert len(source[0]) == 2048


@hypothesis.given(offset=st.integers(0, 131_071), bit=st.integers(0, 7))
@hypothesis.settings(max_examples=60, deadline=None)
def test_flipped_bits_are_never_read_as_data(offset, bit):
    with tempfile.TemporaryDirectory() as name:
        stream = write_set(Path(name), shard_tokens=(4096, 100), dtype="uint16")
        file = Path(name) / "train-0.array_record"
        data = bytearray(file.read_bytes())
        assert len(data) == 131_072
        data[offset] ^= 1 << bit
        file.write_bytes(data)
        try:
            source = TokenSource(name, "train", len(stream))
            tokens = source[0]
        except (ValueError, OSError) as error:
            assert "train-0.array_record" in str(error)
        else:
            assert np.array_equal(tokens, stream)
