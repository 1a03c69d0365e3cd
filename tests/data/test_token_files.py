"""Token files of nanoGPT, llm.c and Megatron-LM: their documents, as they are."""

import hashlib
import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stackjax.data import parts, token_stream
from stackjax.data import piece as reading
from stackjax.data.config import PrepareConfig
from stackjax.data.counts import read_inputs
from stackjax.data.manifest import read_manifest
from stackjax.data.overlap import overlap
from stackjax.data.prepare import prepare
from stackjax.data.sources import TokenSource
from stackjax.runtime.errors import UserError

VOCAB, BEGIN, END = 500, 1, 2
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(3, VOCAB, size).tolist() for size in RNG.integers(1, 60, 100)]
WIDE = 70_000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, capsys):
    """Makes pieces, parts and blocks small, and hides the output."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    monkeypatch.setattr(parts, "PART_BYTES", 700)
    monkeypatch.setattr(token_stream, "BLOCK_TOKENS", 64)


def tokenizer(path: Path, size: int = VOCAB, *, begins: bool = False) -> str:
    """Writes a tokenizer.json; documents perhaps begin with a token."""
    vocab = {f"w{i}": i for i in range(size)}
    vocab = {"?": 0, "<s>": BEGIN, "</s>": END} | {k: i for k, i in vocab.items() if i > 2}
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}},
    }
    fields = {
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": template if begins else None,
    }
    path.write_text(json.dumps(fields))
    return str(path)


def stream(documents: list[list[int]], dtype: str, *, before: bool = False) -> bytes:
    """Returns documents with an end token after, or before, each."""
    tokens = [[END, *each] if before else [*each, END] for each in documents]
    return np.concatenate(tokens).astype(dtype).tobytes()


def header(magic: int, version: int, count: int) -> bytes:
    return np.array([magic, version, count] + [0] * 253, "<i4").tobytes()


def write_nanogpt(path: Path, documents: list[list[int]]) -> None:
    path.write_bytes(stream(documents, "<u2"))


def write_llmc(path: Path, documents: list[list[int]]) -> None:
    data = stream(documents, "<u2", before=True)
    path.write_bytes(header(20240520, 1, len(data) // 2) + data)


def write_llmc_llama(path: Path, documents: list[list[int]]) -> None:
    data = stream(documents, "<u4", before=True)
    path.write_bytes(header(20240801, 7, len(data) // 4) + data)


def write_megatron(
    path: Path, documents: list[list[int]], code: int = 4, *, ends: bool = True, cuts: int = 1
) -> None:
    """Writes documents, each in `cuts` sequences."""
    dtype = {1: "<u1", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    bodies = [[*each, END] if ends else each for each in documents]
    parts = [part for body in bodies for part in np.array_split(np.array(body, dtype), cuts)]
    lengths = np.array([len(part) for part in parts], "<i4")
    offsets = np.concatenate([[0], np.cumsum(lengths * np.dtype(dtype).itemsize)[:-1]])
    bounds = np.arange(len(documents) + 1, dtype="<i8") * cuts
    path.write_bytes(b"".join(part.tobytes() for part in parts))
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(bounds))
    arrays = (lengths, offsets.astype("<i8"), bounds)
    path.with_suffix(".idx").write_bytes(head + b"".join(each.tobytes() for each in arrays))


WRITERS = {
    "nanogpt": write_nanogpt,
    "llm.c": write_llmc,
    "llm.c, llama": write_llmc_llama,
    "megatron": write_megatron,
    "megatron, uint16": lambda path, documents: write_megatron(path, documents, 8),
    "megatron, int64": lambda path, documents: write_megatron(path, documents, 5),
    "megatron without ends": lambda path, documents: write_megatron(
        path, documents, ends=False
    ),
    "megatron, sentences": lambda path, documents: write_megatron(path, documents, cuts=3),
}


def run(directory: Path, *inputs: Path, **options) -> Path:
    """Prepares a data set with a tokenizer of 500 tokens."""
    name = options.pop("tokenizer", None) or tokenizer(directory / "tokenizer.json")
    output = directory / options.pop("output", "out")
    options = {"validation_fraction": 0.0, "num_processes": 1} | options
    paths = (*map(str, inputs), str(output))
    prepare(PrepareConfig(paths=paths, tokenizer=name, **options))
    return output


def documents_of(path: Path, split: str = "train") -> list[list[int]]:
    """Returns the documents of a split, without end tokens."""
    manifest = read_manifest(str(path))
    tokens = TokenSource(str(path), split, manifest.splits[split].tokens)[0]
    ends = np.flatnonzero(tokens == END)
    assert len(ends) == manifest.splits[split].documents
    return [part[:-1].tolist() for part in np.split(tokens, ends + 1)[:-1]]


@pytest.mark.parametrize("name", WRITERS)
def test_documents_are_those_of_the_file(tmp_path, name):
    WRITERS[name](tmp_path / "a.bin", DOCUMENTS)
    output = run(tmp_path, tmp_path / "a.bin")
    assert documents_of(output) == DOCUMENTS
    manifest = read_manifest(str(output))
    assert manifest.hashed == "tokens"
    assert len(manifest.splits["train"].shards) > 3
    (counts,) = read_inputs(str(output))
    assert counts.documents == 100
    assert counts.bytes == 2 * sum(map(len, DOCUMENTS))


def test_all_formats_give_the_same_documents_and_splits(tmp_path):
    splits = []
    for index, write in enumerate(WRITERS.values()):
        file = tmp_path / f"{index}.bin"
        write(file, DOCUMENTS)
        output = run(tmp_path, file, output=f"out{index}", validation_fraction=0.2)
        splits.append([documents_of(output, split) for split in ("train", "validation")])
        shared = overlap(str(tmp_path / "out0"), str(output))
        assert (shared.train, shared.validation) == tuple(map(len, splits[0]))
        assert (shared.validation_in_train, shared.train_in_validation) == (0, 0)
    assert all(each == splits[0] for each in splits)


def test_split_is_a_function_of_the_tokens(tmp_path):
    write_nanogpt(tmp_path / "a.bin", DOCUMENTS)
    output = run(tmp_path, tmp_path / "a.bin", validation_fraction=0.3)

    def is_held_out(document: list[int]) -> bool:
        data = np.array(document, "<u2").tobytes()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        return int.from_bytes(digest, "big") < 0.3 * 2**64

    held_out = [each for each in DOCUMENTS if is_held_out(each)]
    assert documents_of(output, "validation") == held_out != []
    assert documents_of(output) == [each for each in DOCUMENTS if not is_held_out(each)]


@pytest.mark.parametrize("piece_bytes", [2, 14, 100, 10**6])
@pytest.mark.parametrize("name", ["nanogpt", "llm.c", "megatron"])
def test_pieces_do_not_change_the_documents(tmp_path, monkeypatch, name, piece_bytes):
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    few = DOCUMENTS[:20]
    WRITERS[name](tmp_path / "a.bin", few)
    assert documents_of(run(tmp_path, tmp_path / "a.bin")) == few


def test_begin_tokens_are_there_once(tmp_path):
    name = tokenizer(tmp_path / "begins.json", begins=True)
    few = DOCUMENTS[:20]
    mixed = [[BEGIN, *each] if i % 2 else each for i, each in enumerate(few)]
    write_nanogpt(tmp_path / "a.bin", mixed)
    output = run(tmp_path, tmp_path / "a.bin", tokenizer=name)
    assert documents_of(output) == [[BEGIN, *each] for each in few]


def test_end_tokens_within_a_megatron_document_split_it(tmp_path):
    write_megatron(tmp_path / "a.bin", [[5, 6, END, 7], [], [8]])
    output = run(tmp_path, tmp_path / "a.bin")
    assert documents_of(output) == [[5, 6], [7], [8]]
    (counts,) = read_inputs(str(output))
    assert counts.left_out == {"no tokens": 1}


def test_index_beside_a_file_is_no_input_of_its_own(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        write_megatron(tmp_path / "set" / f"{name}.bin", DOCUMENTS[:5])
    assert documents_of(run(tmp_path, tmp_path / "set")) == DOCUMENTS[:5] * 2
    output = run(tmp_path, tmp_path / "set" / "a*", output="more")
    assert documents_of(output) == DOCUMENTS[:5]


def test_unended_last_document_is_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.array([5, END, 6, 7], "<u2").tobytes())
    assert documents_of(run(tmp_path, tmp_path / "a.bin")) == [[5], [6, 7]]


def no_change(path: Path) -> None:
    """Changes nothing."""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_index(path: Path) -> None:
    cut(path.with_suffix(".idx"))


def change_version(path: Path) -> None:
    data = bytearray(path.with_suffix(".idx").read_bytes())
    data[9] = 7
    path.with_suffix(".idx").write_bytes(data)


def make_wide(path: Path) -> None:
    tokenizer(path.parent / "tokenizer.json", WIDE)


REFUSED = [
    ("nanogpt", DOCUMENTS, cut, "are no uint16 tokens"),
    ("nanogpt", DOCUMENTS, make_wide, "its tokens are read as uint16, but"),
    ("nanogpt", [[VOCAB]], no_change, "has the token 500, but the vocabulary"),
    ("llm.c", DOCUMENTS, cut, "is damaged: it has"),
    ("llm.c, llama", [[5], [WIDE]], no_change, "has the token 70000, but the vocabulary"),
    ("megatron", [[5, -1]], no_change, "has the token -1, but the vocabulary"),
    ("megatron", DOCUMENTS, cut, "copy both again"),
    ("megatron", DOCUMENTS, cut_index, "is damaged or has more than tokens"),
    ("megatron", DOCUMENTS, change_version, "has version 7 and dtype code 4"),
]


@pytest.mark.parametrize(("name", "documents", "damage", "message"), REFUSED)
def test_unusable_token_files_are_refused(tmp_path, name, documents, damage, message):
    path, made = tmp_path / "a.bin", tokenizer(tmp_path / "tokenizer.json")
    WRITERS[name](path, documents)
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path, path, tokenizer=made)
    assert "\n" not in str(error.value) and "a." in str(error.value)


def test_file_without_end_tokens_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.arange(3, 400, dtype="<u2").tobytes())
    with pytest.raises(UserError, match="has no end token 2 among its first 397 tokens"):
        run(tmp_path, tmp_path / "a.bin")


def test_texts_and_tokens_together_are_refused(tmp_path):
    write_nanogpt(tmp_path / "a.bin", DOCUMENTS)
    (tmp_path / "b.txt").write_text("w5")
    with pytest.raises(UserError, match=r"b.txt' has text and .*a.bin' has tokens"):
        run(tmp_path, tmp_path / "a.bin", tmp_path / "b.txt")


def test_sets_of_texts_and_of_tokens_are_not_compared(tmp_path):
    write_nanogpt(tmp_path / "a.bin", DOCUMENTS)
    (tmp_path / "b.txt").write_text("w5")
    tokens = run(tmp_path, tmp_path / "a.bin", output="tokens")
    texts = run(tmp_path, tmp_path / "b.txt", output="texts")
    with pytest.raises(UserError, match=r"hashes of tokens, and .* of text"):
        overlap(str(tokens), str(texts))


def test_duplicates_of_token_documents_are_counted(tmp_path):
    write_nanogpt(tmp_path / "a.bin", [*DOCUMENTS, *DOCUMENTS[:7]])
    manifest = read_manifest(str(run(tmp_path, tmp_path / "a.bin")))
    different = Counter(map(tuple, DOCUMENTS))
    assert manifest.splits["train"].duplicates == 107 - len(different)
