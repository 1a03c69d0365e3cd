"""Documents in every input format: order, splitting into pieces, and errors."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import zstandard

from stackjax.data import documents
from stackjax.data import piece as pieces_of_inputs
from stackjax.data.documents import list_pieces, read_documents
from stackjax.data.text_field import LeftOut, Reading
from stackjax.runtime.errors import UserError

TEXTS = [f"document {i}: déjà vu\n" * (i % 7 + 1) for i in range(200)]


def json_lines(texts: list[str], field: str = "text") -> bytes:
    rows = (json.dumps({"id": 1, field: text}) + "\n" for text in texts)
    return "".join(rows).encode()


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_bytes(json_lines(texts))
    return str(path)


def write_gzip(path: Path, texts: list[str]) -> str:
    """Writes a gzip file with two members, like concatenated files."""
    half = len(texts) // 2
    members = (gzip.compress(json_lines(part)) for part in (texts[:half], texts[half:]))
    path.write_bytes(b"".join(members))
    return str(path)


def write_zstd(path: Path, texts: list[str]) -> str:
    half = len(texts) // 2
    frames = (zstandard.compress(json_lines(part)) for part in (texts[:half], texts[half:]))
    path.write_bytes(b"".join(frames))
    return str(path)


def write_parquet(path: Path, texts: list[str]) -> str:
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    return str(path)


def write_texts(path: Path, texts: list[str]) -> str:
    path.mkdir()
    for index, text in enumerate(texts):
        (path / f"{index:05d}").write_bytes(text.encode())
    return str(path / "**")


INPUTS: dict[str, Callable[[Path, list[str]], str]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "texts": write_texts,
}


def read(tmp_path: Path, *inputs, **options) -> list[str | LeftOut]:
    """Returns all documents in some inputs."""
    names, scratch = tuple(map(str, inputs)), str(tmp_path / "scratch")
    reading = Reading(**options)
    pieces = list(list_pieces(names, scratch, reading, Counter()))
    return [text for piece in pieces for text in read_documents(piece, reading)]


@pytest.mark.parametrize("piece_bytes", [1, 7, 300, 10**9])
@pytest.mark.parametrize("name", INPUTS)
def test_documents_round_trip_in_every_format(tmp_path, monkeypatch, name, piece_bytes):
    monkeypatch.setattr(pieces_of_inputs, "PIECE_BYTES", piece_bytes)
    assert read(tmp_path, INPUTS[name](tmp_path / name, TEXTS)) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "texts"])
def test_splittable_formats_are_split(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pieces_of_inputs, "PIECE_BYTES", 300)
    path = INPUTS[name](tmp_path / name, TEXTS)
    pieces = list(list_pieces((path,), str(tmp_path), Reading(), Counter()))
    assert len(pieces) > 5
    assert all(piece.num_bytes > 0 for piece in pieces)
    assert pieces == list(list_pieces((path,), str(tmp_path), Reading(), Counter()))


def test_inputs_keep_their_order_and_globs_are_sorted(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:9])
    write_gzip(tmp_path / "a.jsonl.gz", TEXTS[9:20])
    last = write_parquet(tmp_path / "0.parquet", TEXTS[20:25])
    found = read(tmp_path, tmp_path / "*.jsonl*", last)
    assert found == TEXTS[9:20] + TEXTS[:9] + TEXTS[20:25]


def test_existing_file_with_brackets_is_not_a_glob(tmp_path):
    path = tmp_path / "a[1].txt"
    path.write_text("a")
    assert read(tmp_path, path) == ["a"]


def test_blank_lines_byte_order_mark_and_crlf_are_accepted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert read(tmp_path, path) == ["a", "b"]


def test_unpaired_surrogates_are_replaced(tmp_path):
    assert read(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["a\ud800b"])) == ["a?b"]


class Tiny(tfds.core.GeneratorBasedBuilder):
    """A dataset with, or without, a validation split."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name, version="1.0.0") for name in ("split", "whole")
    ]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "label": np.int64}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        splits = {"train": self._generate_examples(TEXTS[:50])}
        if self.builder_config.name == "split":
            splits["validation"] = self._generate_examples(TEXTS[50:60])
        return splits

    def _generate_examples(self, texts):
        for index, text in enumerate(texts):
            yield index, {"text": text, "label": index}


@pytest.fixture
def tfds_home(tmp_path_factory, monkeypatch) -> Path:
    """An empty directory for TFDS datasets."""
    path = tmp_path_factory.mktemp("tfds")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(path))
    return path


@pytest.fixture
def tiny(tfds_home) -> Callable[[str], str]:
    """Builds a dataset in the TFDS directory, and returns the input name."""
    tfds.disable_progress_bar()

    def build(name: str) -> str:
        builder = tfds.builder(f"tiny/{name}", data_dir=tfds_home, file_format="array_record")
        builder.download_and_prepare()
        return f"tfds:tiny/{name}"

    return build


@pytest.mark.parametrize("piece_bytes", [100, 10**9])
@pytest.mark.parametrize("name", ["split", "whole"])
def test_tfds_dataset_keeps_order_and_splits(tmp_path, tiny, monkeypatch, name, piece_bytes):
    monkeypatch.setattr(pieces_of_inputs, "PIECE_BYTES", piece_bytes)
    found: dict[bool | None, list[str]] = {}
    for piece in list_pieces((tiny(name),), str(tmp_path), Reading(), Counter()):
        found.setdefault(piece.held_out, []).extend(read_documents(piece, Reading()))
    split = {False: TEXTS[:50], True: TEXTS[50:60]}
    assert found == (split if name == "split" else {None: TEXTS[:50]})


def test_tfds_feature_without_text_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"'tfds:tiny/whole', 0: the field 'label' is not"):
        read(tmp_path, tiny("whole"), text_field="label")
    with pytest.raises(ValueError, match=r"no field 'words', only 'label', 'text'"):
        read(tmp_path, tiny("whole"), text_field="words")


DAMAGED_FILES = {
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "line 3: not JSON"),
    "list.jsonl": (b"[1]\n", "is a JSON array"),
    "field.jsonl": (b'{"text": "a"}\n{"words": "b"}\n', "line 2: no field 'text'"),
    "number.jsonl": (b'{"text": 1}\n', "line 1: the field 'text' is not a text"),
    "null.jsonl": (b'{"text": null}\n', "line 1: the field 'text' is not a text"),
    "latin.jsonl": (b'{"text": "\xe9"}\n', "line 1: not UTF-8: 'utf-8' codec"),
    "cut.jsonl.gz": (gzip.compress(json_lines(TEXTS))[:-9], "is truncated"),
    "cut.jsonl.zst": (zstandard.compress(json_lines(TEXTS))[:-9], "is truncated"),
    "junk.jsonl.gz": (b"junk" * 30, "cannot be read"),
    "junk.parquet": (b"junk" * 30, "is not a Parquet file"),
    "latin.txt": (b"caf\xe9", "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_damaged_file_is_named_in_one_line(tmp_path, name):
    content, message = DAMAGED_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(tmp_path, path)
    assert message in str(error.value) and name in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_line_in_a_later_piece_is_named_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_of_inputs, "PIECE_BYTES", 300)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS) + b"{\n")
    with pytest.raises(ValueError, match=f"line {len(TEXTS) + 1}: not JSON"):
        read(tmp_path, path)


def test_missing_column_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(ValueError, match=r"no field 'words', only 'id', 'text'"):
        read(tmp_path, path, text_field="words")
    with pytest.raises(ValueError, match="'id' is not a text"):
        read(tmp_path, path, text_field="id")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.jsonl", "matches no file"),
        ("*.nix", "matches no file"),
        ("", "is a directory"),
    ],
)
def test_missing_file_is_named(tmp_path, source, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, f"{tmp_path}/{source}")
    assert source in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:no_such_dataset", "Dataset no_such_dataset not found"),
        ("tfds:tiny/no_such_config", "cannot be read"),
        ("tfds:tiny:9.9.9", "cannot be read"),
        ("tfds:tiny/whole", "file_format='array_record'"),
        ("tfds:", "cannot be read"),
    ],
)
def test_missing_dataset_is_named(tmp_path, tfds_home, source, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, source)
    assert repr(source) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "inputs",
    [("a.txt", "*.txt"), ("*.txt", "a*"), ("a.txt", "./a.txt"), ("tfds:x", "tfds:x")],
)
def test_file_in_two_inputs_is_refused(tmp_path, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(documents, "list_tfds", lambda *args: iter(()))
    with pytest.raises(
        UserError, match=r"(a\.txt|tfds:x)', which input .* names too; it would"
    ):
        list(list_pieces(inputs, "", Reading(), Counter()))


def test_repeated_glob_matches_are_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("c")
    assert len(list(list_pieces(("**/**/*.txt",), "", Reading(), Counter()))) == 1
