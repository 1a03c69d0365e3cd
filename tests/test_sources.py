"""Sequences are slices of the stream, and damage is never read as data."""

import json
import pickle
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stackjax.data import sources
from stackjax.data.shards import ShardWriter
from stackjax.data.sources import Manifest, Split, TokenizerInfo, TokenSource

INFO = TokenizerInfo(name="bytes", digest="0", vocab_size=70_000, end_id=0)
SHARD_TOKENS = (5000, 1, 2048, 4096, 333)


def write_set(path: Path, shard_tokens=SHARD_TOKENS, dtype="uint32") -> np.ndarray:
    """Writes a set of random tokens and returns the stream of its split `train`."""
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    shards, stream = [], []
    for index, length in enumerate(shard_tokens):
        tokens = rng.integers(0, 256 if dtype == "uint16" else 70_000, length)
        writer = ShardWriter(path / f"train-{index}.array_record", dtype)
        for part in np.array_split(tokens, 3):
            writer.write(part)
        shards.append(writer.close())
        stream.append(tokens)
    train = Split(tokens=sum(shard_tokens), documents=0, shards=tuple(shards))
    empty = Split(tokens=0, documents=0, shards=())
    splits = {"train": train, "validation": empty}
    sources.write_manifest(str(path), Manifest(tokenizer=INFO, dtype=dtype, splits=splits))
    return np.concatenate(stream)


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
def test_a_sequence_is_a_slice_of_the_stream(written, seq_len, index):
    path, stream = written
    source = TokenSource(path, "train", seq_len)
    assert len(source) == len(stream) // seq_len
    index %= len(source)
    tokens_T = source[index]
    assert tokens_T.dtype == np.int32
    assert np.array_equal(tokens_T, stream[index * seq_len : (index + 1) * seq_len])


def test_indices_outside_are_refused(written):
    source = TokenSource(written[0], "train", 100)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="outside"):
            source[index]


def test_a_pickled_source_reads_the_same(written):
    source = TokenSource(written[0], "train", 3000)
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert all(np.array_equal(copy[k], source[k]) for k in range(len(source)))


def test_the_manifest_survives_writing(directory):
    manifest = sources.read_manifest(str(directory))
    (directory / sources.MANIFEST).unlink()
    sources.write_manifest(str(directory), manifest)
    assert sources.read_manifest(str(directory)) == manifest


def test_a_missing_set_says_how_to_make_it(tmp_path):
    with pytest.raises(ValueError, match=r"python -m stackjax.prepare INPUT\.\.\."):
        TokenSource(str(tmp_path / "absent"), "train", 8)


@pytest.mark.parametrize("seq_len", [sum(SHARD_TOKENS) + 1, 10**9])
def test_a_split_too_short_for_a_sequence_is_refused(directory, seq_len):
    with pytest.raises(ValueError, match="fewer than one sequence"):
        TokenSource(str(directory), "train", seq_len)


def test_an_empty_validation_split_names_the_option(directory):
    with pytest.raises(ValueError, match="--validation-fraction"):
        TokenSource(str(directory), "validation", 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda fields: fields.update(format=0), "not of format 1"),
        (lambda fields: fields.pop("format"), "not of format 1"),
        (lambda fields: fields.pop("dtype"), "dtype"),
        (lambda fields: fields["tokenizer"].pop("end_id"), "end_id"),
        (lambda fields: fields["splits"].pop("train"), "no split 'train'"),
        (lambda fields: fields["splits"]["train"].pop("shards"), "shards"),
        (lambda fields: fields.update(new=1), "new"),
    ],
)
def test_a_strange_manifest_is_refused(directory, change, says):
    file = directory / sources.MANIFEST
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=says) as error:
        TokenSource(str(directory), "train", 8)
    assert "prepare it again" in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_manifest_that_is_no_json_object_is_refused(directory, content):
    (directory / sources.MANIFEST).write_text(content)
    with pytest.raises(ValueError, match="prepare it again"):
        TokenSource(str(directory), "train", 8)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "has 0 bytes"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes where"),
        (lambda file: file.write_bytes(file.read_bytes()[:65536]), "bytes where"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "bytes where"),
        (lambda file: file.write_bytes(bytes(file.stat().st_size)), "readable records"),
        (lambda file: flip(file, -65536), "readable records"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(directory, damage, says):
    file = directory / "train-3.array_record"
    damage(file)
    with pytest.raises(ValueError, match=says) as error:
        TokenSource(str(directory), "train", 8)
    assert "train-3.array_record" in str(error.value)
    assert "prepare it again" in str(error.value)


def test_a_shard_with_other_records_is_refused(directory):
    """Same size, other number of records: the padding of ArrayRecord hides it."""
    file = directory / "train-3.array_record"
    size = file.stat().st_size
    writer = ShardWriter(file, "uint32")
    writer.write(np.zeros(2048 * 3, np.int64))
    assert writer.close().bytes == size
    with pytest.raises(ValueError, match="3 readable records where the manifest says 2"):
        TokenSource(str(directory), "train", 8)


def test_a_record_of_another_length_is_refused(directory):
    file = directory / "train-3.array_record"
    writer = ShardWriter(file, "uint16")
    writer.write(np.zeros(4096, np.int64))
    writer.close()
    source = TokenSource(str(directory), "train", 2048)
    with pytest.raises(OSError, match=r"record 0 of shard .*train-3.* 4096 bytes"):
        source[4]


def flip(file: Path, offset: int) -> None:
    """Flips one bit of a file."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x10
    file.write_bytes(data)


def test_a_flipped_bit_names_the_record(directory):
    flip(directory / "train-0.array_record", 20_000)
    source = TokenSource(str(directory), "train", 2048)
    with pytest.raises(OSError, match=r"record 2 of shard .*train-0.*damaged") as error:
        source[2]
    assert "prepare it again" in str(error.value)
    assert len(source[0]) == 2048


@hypothesis.given(offset=st.integers(0, 131_071), bit=st.integers(0, 7))
@hypothesis.settings(max_examples=60, deadline=None)
def test_no_flipped_bit_is_ever_read_as_data(offset, bit):
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
