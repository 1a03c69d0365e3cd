"""`tokenizer`: training on the inputs of `prepare`, the report, and the way to a folder."""

import dataclasses
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import transformers

from stackjax.data import train_tokenizer as training
from stackjax.data.config import PrepareConfig
from stackjax.data.documents import list_pieces
from stackjax.data.prepare import prepare
from stackjax.data.sources import TokenSource, read_manifest
from stackjax.data.text_field import Reading
from stackjax.data.tokenizer_config import TokenizerConfig
from stackjax.data.train_tokenizer import train, write_tokenizer
from stackjax.inference.convert import convert
from stackjax.interop.folder import write_tokenizer as export
from stackjax.options import ConvertConfig
from stackjax.run.train import train as train_model
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.__main__ import main
from stackjax.tokenizer.tokenizer import load_tokenizer
from stackjax.tokenizer.train_bpe import train_bpe

END = "<|endoftext|>"
TEXTS = [f"document {i}: déjà vu 日本\0 quotes {END}\n" * (i % 7 + 1) for i in range(60)]
TEXT_BYTES = len("".join(TEXTS).encode())


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_inputs(directory: Path) -> dict[str, list[str]]:
    """Writes `TEXTS` as inputs of every kind; returns the texts by input."""
    (directory / "a.jsonl").write_bytes(json_lines(TEXTS[:20]))
    (directory / "b.json.gz").write_bytes(gzip.compress(json_lines([*TEXTS[20:40], ""])))
    pa.parquet.write_table(pa.table({"text": TEXTS[40:50]}), directory / "c.parquet")
    plain = [text.replace("\0", "") for text in TEXTS[50:]]
    for index, text in enumerate(plain):
        (directory / f"{index}.txt").write_text(text)
    parts = [TEXTS[:20], TEXTS[20:40], TEXTS[40:50], plain]
    names = ("a.jsonl", "b.json.gz", "c.parquet", "*.txt")
    return {str(directory / name): part for name, part in zip(names, parts, strict=True)}


def options(*inputs: object, **fields) -> TokenizerConfig:
    return TokenizerConfig(inputs=tuple(map(str, inputs)), **({"vocab_size": 300} | fields))


def trained_here(config: TokenizerConfig) -> training.Trained:
    """Trains in this process."""
    return train(config, list(list_pieces(config.inputs, "unused", Reading(), Counter())))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "a.jsonl").write_bytes(json_lines(TEXTS))
    output = directory / "tokenizer.json"
    write_tokenizer(options(directory / "a.jsonl", output=output))
    return output


def test_every_kind_of_input_is_read(tmp_path):
    inputs = write_inputs(tmp_path)
    trained = trained_here(options(*inputs))
    texts = [text for part in inputs.values() for text in part]
    assert trained.definition == train_bpe(texts, 300, [END])
    for name, part in inputs.items():
        total = trained.texts[name].total
        assert (total.documents, total.num_bytes) == (len(part), len("".join(part).encode()))
        assert sorted(trained.texts[name].sample.documents) == sorted(map(str.encode, part))
    assert trained.used.documents == len(texts)


@pytest.mark.parametrize(
    ("name", "value"), [("RAYON_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")]
)
def test_threads_have_no_effect(tokenizer_file, tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    output = tmp_path / "tokenizer.json"
    write_tokenizer(options(tokenizer_file.with_name("a.jsonl"), output=output))
    assert output.read_bytes() == tokenizer_file.read_bytes()
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_max_bytes_trains_on_a_sample(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "b.jsonl").write_bytes(json_lines(TEXTS[::-1]))
    limit = TEXT_BYTES // 2
    found = [trained_here(options(tmp_path / f"{x}.jsonl", max_bytes=limit)) for x in "ab"]
    assert found[0].definition == found[1].definition
    assert limit - max(map(len, map(str.encode, TEXTS))) < found[0].used.num_bytes <= limit
    whole = trained_here(options(tmp_path / "a.jsonl", max_bytes=TEXT_BYTES))
    assert whole.used.documents == len(TEXTS)
    assert whole.definition == train_bpe(TEXTS, 300, [END])
    assert "merging pairs of tokens, from 0.0 MB" in capsys.readouterr().out


def test_report_has_the_bytes_per_token_of_every_input(tmp_path, run_main):
    inputs = write_inputs(tmp_path)
    output = tmp_path / "tokenizer.json"
    code, out, err = run_main(main, *inputs, "--vocab-size", 320, "--output", output)
    assert (code, err) == (0, "")
    judge = tokenizers.Tokenizer.from_file(str(output))
    assert judge.get_vocab_size() == 320
    judge.encode_special_tokens = True
    said, _, _, *rows = out.splitlines()[-7:]
    assert said == (
        f"{output}: 320 entries from {len(TEXTS)} documents, "
        f"{sum(len(''.join(part).encode()) for part in inputs.values())} bytes"
    )
    for row, (name, part) in zip(rows, inputs.items(), strict=True):
        size = len("".join(part).encode())
        tokens = sum(len(judge.encode(text).ids) for text in part)
        counts = (len(part), size, len(part), size, tokens)
        assert row.split() == [name, *map(str, counts), f"{size / tokens:.3f}"]


def test_report_measures_a_sample(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    monkeypatch.setattr(training, "MEASURED_BYTES", TEXT_BYTES // 2)
    sample = trained_here(options(tmp_path / "a.jsonl")).texts[str(tmp_path / "a.jsonl")].sample
    assert 0 < sample.num_bytes <= TEXT_BYTES // 2
    assert set(sample.documents) < set(map(str.encode, TEXTS))


def test_prepared_documents_are_the_texts(tokenizer_file, tmp_path, capsys):
    source, output = tokenizer_file.with_name("a.jsonl"), tmp_path / "set"
    prepare(
        PrepareConfig(
            paths=(str(source), str(output)),
            tokenizer=str(tokenizer_file),
            validation_fraction=0,
            num_processes=1,
        )
    )
    manifest = read_manifest(str(output))
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.end_id) == (300, 0)
    stream = TokenSource(str(output), "train", manifest.splits["train"].tokens)[0]
    ends = np.flatnonzero(stream == 0)
    tokenizer = load_tokenizer(str(output / "tokenizer.json"))
    documents = [tokenizer.decode(part[:-1]) for part in np.split(stream, ends + 1)[:-1]]
    assert documents == TEXTS


def test_transformers_reads_the_exported_tokenizer(tokenizer_file, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_file))
    export(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == (END, 0, 300)
    for text in (*TEXTS[:3], " x\n\n  it's 12345", ""):
        ids = tokenizer.encode_special(text).tolist()
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text


@pytest.mark.slow
def test_exported_run_has_the_tokenizer(tokenizer_file, world, tmp_path):
    data = tmp_path / "set"
    prepare(
        PrepareConfig(
            paths=(str(tokenizer_file.with_name("a.jsonl")), str(data)),
            tokenizer=str(tokenizer_file),
            validation_fraction=0.3,
        )
    )
    config = world.config(workdir=tmp_path / "run")
    train_model(
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, path=str(data)),
            model=dataclasses.replace(config.model, vocab_size=300),
        )
    )
    convert(ConvertConfig(source=str(tmp_path / "run"), target=str(tmp_path / "out")))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = load_tokenizer(str(tokenizer_file))
    for text in (*TEXTS[:3], " x\n\n  it's 12345"):
        assert theirs(text).input_ids == tokenizer.encode_special(text).tolist()


REFUSED = {
    "no text": (["empty.jsonl"], {}, "the inputs have no text: "),
    "no file": (["nothing*.txt"], {}, "matches no file"),
    "twice": (["a.jsonl", "*.jsonl"], {}, "names too"),
    "bad row": (["bad.jsonl"], {}, "line 2: the field 'text' is not a text but null"),
    "few pairs": (["a.jsonl"], {"vocab_size": 5000}, "entries; pass --vocab-size "),
    "few bytes": (["a.jsonl"], {"max_bytes": 5}, "max_bytes is 5, but the first document"),
    "no entries": (["a.jsonl"], {"vocab_size": 256}, "it must be at least 257"),
    "special": (["a.jsonl"], {"special_tokens": ("the",)}, "special_tokens has 'the'"),
    "no directory": (["a.jsonl"], {"output": "no/t.json"}, "there is no directory"),
    "existing": (["a.jsonl"], {"output": "old.json"}, "exists already; name another"),
    "directory": (["a.jsonl"], {"output": "directory.json"}, "a directory; name a file"),
    "name": (["a.jsonl"], {"output": "tokenizer.model"}, "it must end in .json"),
    "tokens": (["a.bin"], {}, "has tokens; a tokenizer is trained on text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_in_one_line(case, tmp_path, monkeypatch):
    names, fields, message = REFUSED[case]
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "empty.jsonl").write_bytes(json_lines(["", ""]))
    (tmp_path / "bad.jsonl").write_bytes(json_lines(["a"]) + b'{"text": null}\n')
    (tmp_path / "a.bin").write_bytes(bytes(20))
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "directory.json").mkdir()
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    # A worker process takes a second to start.
    monkeypatch.setattr(training, "run_in_process", lambda function, *args: function(*args))
    fields = fields | {"output": Path(fields.get("output", "tokenizer.json"))}
    with pytest.raises(UserError, match=message) as error:
        write_tokenizer(options(*names, **fields))
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "old.json").read_text() == "old"


def test_error_in_the_worker_process_is_one_line(tmp_path, run_main):
    (tmp_path / "bad.jsonl").write_bytes(json_lines(["a"]) + b'{"text": null}\n')
    output = tmp_path / "tokenizer.json"
    args = (tmp_path / "bad.jsonl", "--vocab-size", 300, "--output", output)
    code, _, err = run_main(main, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    code, _, err = run_main(main, *args, "--on-missing", "skip")
    assert code == 2 and "only 257 entries" in err
    assert not output.exists()


def end_process(*_) -> None:
    os._exit(9)


def test_killed_worker_process_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    monkeypatch.setattr(training, "train", end_process)
    config = options(tmp_path / "a.jsonl", output=tmp_path / "tokenizer.json")
    with pytest.raises(OSError, match="perhaps for lack of memory; train on less text"):
        write_tokenizer(config)
