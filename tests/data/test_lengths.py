"""Document lengths beside the shards: contents, damage and copies."""

from pathlib import Path

import numpy as np
import pytest
from etils import epath

from stackjax.data import packing
from stackjax.data.cache import local_copy
from stackjax.data.document import Document
from stackjax.data.lengths import LengthsWriter, read_lengths
from stackjax.data.manifest import Manifest, Shard, Split, write_manifest
from stackjax.data.part_counts import PartCounts
from stackjax.data.shards import ShardWriter, write_shards
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer import load_tokenizer
from stackjax.tokenizer.tokenizer_info import TokenizerInfo

DOCUMENTS = [np.arange(1, n) for n in (7, 2, 3000, 2, 90)]
LENGTHS = [7, 2, 3000, 2, 90]
REMEDY = "copy it again"


def write(path: Path) -> Shard:
    """Writes the documents as a shard, in two parts."""
    writer = ShardWriter(path / "train.array_record", "uint16")
    for part in (slice(2), slice(2, 5)):
        tokens = packing.join_documents(DOCUMENTS[part], end_id=0)
        writer.write(tokens, np.array(LENGTHS[part]))
    return writer.close()


def read(path: Path, shard: Shard) -> np.ndarray:
    return read_lengths(epath.Path(path) / shard.lengths.file, shard, REMEDY)


def test_lengths_are_read_as_written(tmp_path):
    shard = write(tmp_path)
    assert shard.lengths.documents == len(LENGTHS)
    assert (tmp_path / shard.lengths.file).read_bytes() == np.array(LENGTHS, "<u4").tobytes()
    found = read(tmp_path, shard)
    assert found.dtype == np.uint32
    assert found.tolist() == LENGTHS


def test_lengths_count_the_special_tokens(tmp_path):
    tokenizer = load_tokenizer("bytes")
    texts = [("train", "abc"), ("train", ""), ("validation", "x"), ("train", "déjà")]
    documents = (
        Document(split=split, content=text, hash=0, bytes=len(text), source="a")
        for split, text in texts
    )
    counts = PartCounts()
    counts.open("a")
    written = write_shards(documents, tokenizer, tmp_path / "part", counts)
    found = {split: read(tmp_path, shard).tolist() for split, (shard, _) in written.items()}
    assert found == {"train": [4, 7], "validation": [2]}


DAMAGES = [
    (lambda data: data[:-4], "has other lengths"),
    (lambda data: data[4:] + data[:4], "has other lengths"),
    (lambda data: data[:5] + b"\1" + data[6:], "has other lengths"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_lengths_are_refused(tmp_path, damage, message):
    shard = write(tmp_path)
    file = tmp_path / shard.lengths.file
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"train.array_record.lengths' {message}.*{REMEDY}"):
        read(tmp_path, shard)


@pytest.mark.parametrize("lengths", [[7, 2, 3000, 2, 91], [7, 0, 3002, 2, 90]])
def test_lengths_of_other_documents_are_refused(tmp_path, lengths):
    shard = write(tmp_path)
    writer = LengthsWriter(tmp_path / shard.lengths.file)
    writer.write(np.array(lengths))
    other = Shard(**(vars(shard) | {"lengths": writer.close()}))
    with pytest.raises(UserError, match="do not sum to the 3101 tokens"):
        read(tmp_path, other)


def test_longest_document_fits_and_a_longer_one_is_refused(tmp_path):
    writer = LengthsWriter(tmp_path / "lengths")
    writer.write(np.array([2**32 - 1]))
    with pytest.raises(UserError, match=f"a document has {2**32} tokens, more than"):
        writer.write(np.array([5, 2**32]))
    assert writer.close().documents == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_lengths_are_copied_to_the_cache(tmp_path, damaged):
    source = tmp_path / "set"
    source.mkdir()
    shard = write(source)
    stream = Split(tokens=shard.tokens, documents=len(LENGTHS), shards=(shard,))
    info = TokenizerInfo(name="bytes", digest="0", vocab_size=256, end_id=0)
    manifest = Manifest(tokenizer=info, dtype="uint16", splits={"train": stream})
    write_manifest(str(source), manifest)
    if damaged:
        file = source / shard.lengths.file
        file.write_bytes(file.read_bytes()[::-1])
        with pytest.raises(OSError, match=r"lengths' has other content than in the manifest"):
            local_copy(str(source), "train", str(tmp_path / "cache"))
        assert not list((tmp_path / "cache").glob("*/*.lengths*"))
    else:
        copied = local_copy(str(source), "train", str(tmp_path / "cache"))
        assert read(Path(copied), shard).tolist() == LENGTHS
