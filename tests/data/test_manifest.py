"""Data set manifests: round trips, damage and digests."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from stackjax.data.manifest import (
    MANIFEST,
    LengthsFile,
    Manifest,
    Shard,
    Split,
    TokenizerInfo,
    read_manifest,
    sealed,
    write_manifest,
)
from stackjax.runtime.errors import UserError

HASHES = {"hash": "0" * 64, "ends": "f" * 64}
SHARDS = tuple(
    Shard(
        file=f"train-{i}",
        bytes=10_000,
        records=2,
        tokens=tokens,
        lengths=LengthsFile(file=f"train-{i}.lengths", bytes=4 * documents, hash="a" * 64),
        **HASHES,
    )
    for i, (tokens, documents) in enumerate(((2049, 3), (4096, 4)))
)
GOOD = Manifest(
    tokenizer=TokenizerInfo(name="bytes", digest="bytes-digest", vocab_size=256, end_id=0),
    dtype="uint16",
    splits={
        "train": Split(tokens=6145, documents=7, shards=SHARDS),
        "validation": Split(tokens=0, documents=0, shards=()),
    },
)


def refusal(directory: Path) -> str:
    """Returns a damaged manifest's error message."""
    with pytest.raises(UserError) as error:
        read_manifest(str(directory))
    assert "\n" not in str(error.value)
    assert "prepare it again" in str(error.value)
    return str(error.value)


def test_manifest_round_trips(tmp_path):
    write_manifest(str(tmp_path), GOOD)
    assert read_manifest(str(tmp_path)) == GOOD


def shard(**fields):
    return lambda manifest: manifest["splits"]["train"]["shards"][1].update(fields)


def lengths(**fields):
    return lambda manifest: manifest["splits"]["train"]["shards"][1]["lengths"].update(fields)


def tokenizer(**fields):
    return lambda manifest: manifest["tokenizer"].update(fields)


def train(**fields):
    return lambda manifest: manifest["splits"]["train"].update(fields)


def root(**fields):
    return lambda manifest: manifest.update(fields)


INCONSISTENT = [
    (root(format=2), "format is 2, not 3"),
    (root(format=True), "format is True, not 3"),
    (lambda fields: fields.pop("format"), "format is None, not 3"),
    (lambda fields: fields.pop("dtype"), "dtype is missing"),
    (lambda fields: fields["tokenizer"].pop("end_id"), "tokenizer.end_id is missing"),
    (lambda fields: fields["splits"]["train"].pop("shards"), "splits.train.shards is missing"),
    (root(new=1), "new is not a known field"),
    (root(dtype="float64"), "dtype is 'float64', which is not 'uint16' or 'uint32'"),
    (root(dtype=16), "dtype is 16"),
    (root(record_tokens=0), "record_tokens is 0"),
    (root(record_tokens=2048.0), "record_tokens is 2048.0, which is not an integer"),
    (root(record_tokens=1), "2049 tokens in 2 records"),
    (root(splits={}), "splits is empty"),
    (root(splits=[]), "splits is [], which is not an object"),
    (root(splits=None), "splits is None"),
    (root(tokenizer="bytes"), "tokenizer is 'bytes'"),
    (lambda fields: fields["splits"].update(test=fields["splits"]["train"]), "'test'"),
    (tokenizer(vocab_size=0), "tokenizer.vocab_size is 0"),
    (tokenizer(vocab_size=65_537), "tokenizer.vocab_size is 65537"),
    (tokenizer(vocab_size=True), "which is not an integer"),
    (tokenizer(vocab_size=float("nan")), "the number NaN"),
    (tokenizer(end_id=-1), "tokenizer.end_id is -1, outside 0..255"),
    (tokenizer(end_id=256), "tokenizer.end_id is 256, outside 0..255"),
    (tokenizer(name=None), "tokenizer.name is None, which is not a text"),
    (train(tokens=-1), "splits.train.tokens is -1, not the sum"),
    (train(tokens=10**30), "not the sum over its shards"),
    (train(documents=-1), "splits.train.documents is -1, outside 0..6145"),
    (train(documents=6146), "splits.train.documents is 6146"),
    (train(shards={}), "splits.train.shards is {}, which is not a list"),
    (train(shards=[1]), "splits.train.shards.0 is 1, which is not an object"),
    (shard(records=0), "4096 tokens in 0 records"),
    (shard(records=-2), "4096 tokens in -2 records"),
    (shard(tokens=0), "splits.train.tokens is 6145, not the sum"),
    (shard(bytes=-1), "4096 tokens in -1 bytes"),
    (shard(bytes=8191), "4096 tokens in 8191 bytes"),
    (shard(hash="0"), "invalid hash"),
    (shard(file="train-0"), "two files have the same name"),
    (shard(file=MANIFEST), "two files have the same name"),
    (shard(file=7), "splits.train.shards.1.file is 7"),
    (shard(file="deep/train-1"), "a name with a slash"),
    (train(documents=6), "splits.train.documents is 6, not the number of lengths"),
    (shard(lengths=None), "splits.train.shards.1.lengths is None"),
    (lengths(bytes=12), "splits.train.documents is 7, not the number of lengths"),
    (lengths(bytes=17), "document lengths in 17 bytes"),
    (lengths(bytes=0), "0 document lengths for 4096 tokens"),
    (lengths(bytes=4 * 4097), "4097 document lengths for 4096 tokens"),
    (lengths(hash="0"), "invalid hash"),
    (lengths(file="train-1"), "two files have the same name"),
    (lengths(file="train-0.lengths"), "two files have the same name"),
    (lengths(file="deep/train-1.lengths"), "a name with a slash"),
]
OUTSIDE = ["../x", "/etc/hostname", "..", ".", "", "a\0b", "x" * 300, "\ud800"]


@pytest.mark.parametrize(("change", "message"), INCONSISTENT)
def test_inconsistent_manifest_is_refused(tmp_path, change, message):
    fields = dataclasses.asdict(GOOD)
    change(fields)
    (tmp_path / MANIFEST).write_text(sealed(fields))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("name", OUTSIDE)
def test_shard_outside_the_directory_is_refused(tmp_path, name):
    fields = dataclasses.asdict(GOOD)
    shard(file=name)(fields)
    (tmp_path / MANIFEST).write_text(sealed(fields))
    with pytest.raises(UserError, match=r"slash|names the file"):
        read_manifest(str(tmp_path))


def test_link_out_of_the_directory_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "set" / "train-1").symlink_to(tmp_path / "secret")
    write_manifest(str(tmp_path / "set"), GOOD)
    with pytest.raises(UserError, match=r"is a link to .*secret, outside"):
        read_manifest(str(tmp_path / "set"))


CONTENTS = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"1" * 5000, b"[" * 10**5, b"\0" * 100]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_file_without_a_json_object_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    refusal(tmp_path)


def test_flipped_bit_is_refused_or_harmless(tmp_path):
    write_manifest(str(tmp_path), GOOD)
    file = tmp_path / MANIFEST
    data = file.read_bytes()
    refused = 0
    for offset in range(len(data)):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << (0, 3, 5)[offset % 3]
        file.write_bytes(flipped)
        try:
            assert read_manifest(str(tmp_path)) == GOOD
        except UserError:
            refused += 1
    assert refused > 2 / 3 * len(data)


VALUES = [None, True, -1, 0, 1, 2**70, 1.5, float("inf"), "", "../x", [], {}, [None], {"a": 1}]


def mutate(value: object, rng: random.Random) -> object:
    """Returns a JSON value with a single change at any depth."""
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    changed = value.copy()
    if rng.random() < 0.1:
        del changed[key]
    else:
        changed[key] = mutate(value[key], rng)
    return changed


def test_random_mutation_is_refused_or_a_valid_manifest(tmp_path):
    write_manifest(str(tmp_path), GOOD)
    good = json.loads((tmp_path / MANIFEST).read_text())
    del good["checksum"]
    refused = 0
    for seed in range(400):
        fields = mutate(good, random.Random(seed))
        text = sealed(fields) if isinstance(fields, dict) else json.dumps(fields)
        (tmp_path / MANIFEST).write_text(text)
        try:
            read_manifest(str(tmp_path))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


def test_digest_depends_on_content_but_not_on_names():
    splits = {"validation": GOOD.splits["validation"]}

    def with_shards(*shards: Shard) -> Manifest:
        stream = dataclasses.replace(GOOD.splits["train"], shards=shards)
        return dataclasses.replace(GOOD, splits={"train": stream, **splits})

    first, second = SHARDS
    info = dataclasses.replace(GOOD.tokenizer, name="/elsewhere/tokenizer.json")
    assert dataclasses.replace(GOOD, tokenizer=info).digest == GOOD.digest
    moved = dataclasses.replace(first, file="renamed", bytes=20_000)
    assert with_shards(moved, second).digest == GOOD.digest
    other = dataclasses.replace(first, hash="1" * 64)
    assert with_shards(other, second).digest != GOOD.digest
    assert with_shards(second, first).digest != GOOD.digest
    for change in ({"digest": "other"}, {"end_id": 1}):
        info = dataclasses.replace(GOOD.tokenizer, **change)
        assert dataclasses.replace(GOOD, tokenizer=info).digest != GOOD.digest
