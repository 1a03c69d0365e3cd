"""`data`: a data set, and the data that a run reads, as text, JSON and a picture."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tokenizer_kinds import write_kind

from stackjax.analysis.length_figure import length_figure
from stackjax.analysis.run_data import read_run_data
from stackjax.config_file import read_config
from stackjax.data import packing
from stackjax.data.__main__ import main
from stackjax.data.config import PrepareConfig
from stackjax.data.example_documents import HEAD, TAIL
from stackjax.data.length_counts import count_lengths
from stackjax.data.loader import train_batches
from stackjax.data.manifest import read_manifest, write_manifest
from stackjax.data.open import open_train
from stackjax.data.prepare import prepare
from stackjax.data.sources import TokenSource
from stackjax.data.token_lines import visible
from stackjax.training.batches import data_order
from stackjax.training.expand import expand

LENGTHS = (3, 40, 700, 5, 2000, 1, 90, 90, 800, 12)
TEXTS = [f"{i}{j}é\n" + chr(97 + j) * n for i in range(9) for j, n in enumerate(LENGTHS)]
NUM_FILES = 12


def make(path: Path, texts: list[str], **options) -> str:
    """Prepares files with different sizes, each with a row without a text."""
    inputs = path.with_suffix(".in")
    inputs.mkdir()
    rows = [json.dumps({"text": text}) for text in texts]
    for index in range(NUM_FILES):
        lines = [*rows[index::NUM_FILES], '{"text": null}']
        (inputs / f"{index:02}.jsonl").write_text("\n".join(lines))
    options = {
        "tokenizer": "bytes",
        "on_missing": "skip",
        "num_processes": 1,
        "validation_fraction": 0.2,
    } | options
    prepare(PrepareConfig(paths=(str(inputs / "*.jsonl"), str(path)), **options))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A data set of 80 documents, of which 10 occur twice."""
    return make(tmp_path_factory.mktemp("view") / "set", [*TEXTS[:70], *TEXTS[:10]])


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A data set that shares 20 documents."""
    return make(tmp_path_factory.mktemp("view") / "other", TEXTS[50:])


def documents(path: str, split: str) -> list[bytes]:
    """Returns the texts of a split in bytes, with their end tokens."""
    num_tokens = read_manifest(path).splits[split].tokens
    stream = TokenSource(path, split, 1).read(0, num_tokens).astype(np.uint8).tobytes()
    return [document + b"\0" for document in stream.split(b"\0")[:-1]]


def shown(run_main, *args) -> str:
    code, out, errors = run_main(main, *args)
    assert (code, errors) == (0, "")
    return out


def numbers(run_main, tmp_path: Path, *args) -> dict:
    shown(run_main, *args, "--json", tmp_path / "numbers.json")
    return json.loads((tmp_path / "numbers.json").read_text())


def test_numbers_are_those_of_the_documents(run_main, tmp_path, data):
    found = numbers(run_main, tmp_path, data)
    for name, split in found["splits"].items():
        expected = documents(data, name)
        lengths = np.array([len(document) for document in expected])
        assert split["documents"] == len(lengths)
        assert split["tokens"] == lengths.sum()
        assert split["duplicates"] == len(expected) - len(set(expected))
        assert split["lengths"]["longest"] == lengths.max()
        assert split["lengths"]["mean"] == pytest.approx(lengths.mean())
        assert split["lengths"]["median"] == pytest.approx(np.median(lengths), rel=1e-3)
        for octave in split["lengths"]["histogram"]:
            inside = (octave["longer_than"] < lengths) & (lengths <= octave["up_to"])
            assert octave["documents"] == inside.sum()
            assert octave["tokens"] == lengths[inside].sum()
    assert sum(split["documents"] for split in found["splits"].values()) == 80
    num_bytes = sum(len(text.encode()) for text in [*TEXTS[:70], *TEXTS[:10]])
    assert found["bytes_per_token"] == pytest.approx(num_bytes / (num_bytes + 80))
    assert found["left_out"] == {"null text": NUM_FILES}
    assert (found["inputs"]["files"], found["inputs"]["bytes"]) == (NUM_FILES, num_bytes)
    assert found["digest"] == read_manifest(data).digest


def test_text_has_the_numbers(run_main, tmp_path, data):
    found, out = numbers(run_main, tmp_path, data), shown(run_main, data)
    train = found["splits"]["train"]
    assert f"{data}: tokenizer bytes (" in out
    cells = (train["documents"], train["duplicates"], train["tokens"])
    row = next(line for line in out.splitlines() if line.startswith("train "))
    assert row.split()[1:4] == [f"{cell:,}" for cell in cells]
    assert f"bytes per token: {found['bytes_per_token']:.3f}," in out
    assert "left out: 12 (null text)" in out
    assert "documents in both splits: 0" in out
    for octave in train["lengths"]["histogram"]:
        start = [f"{octave['up_to']:,}", f"{octave['documents']:,}"]
        assert any(line.split()[:2] == start for line in out.splitlines())


def test_largest_inputs_are_shown_and_the_others_counted(run_main, data):
    out = shown(run_main, data)
    sizes = {
        f"{index:02}.jsonl": sum(
            len(text.encode()) for text in [*TEXTS[:70], *TEXTS[:10]][index::NUM_FILES]
        )
        for index in range(NUM_FILES)
    }
    largest = sorted(sizes.values(), reverse=True)[:10]
    lines = [line.split() for line in out.splitlines() if ".jsonl" in line]
    assert [int(cells[1].replace(",", "")) for cells in lines] == largest
    for cells in lines:
        assert sizes[Path(cells[2]).name] == int(cells[1].replace(",", ""))
        assert cells[3:] == ["1", "(null", "text)"]
    assert "\nand 2 more\n" in out


def test_shared_documents_are_those_of_both_sets(run_main, tmp_path, data, other):
    found = numbers(run_main, tmp_path, data, "--compare-with", other, data)
    ours, theirs = (
        {s: set(documents(p, s)) for s in ("train", "validation")} for p in (data, other)
    )
    assert found["overlaps"][other] == {
        "train": len(ours["train"] & theirs["train"]),
        "validation": len(ours["validation"] & theirs["validation"]),
        "validation_in_train": len(ours["validation"] & theirs["train"]),
        "train_in_validation": len(ours["train"] & theirs["validation"]),
    }
    assert sum(found["overlaps"][other].values()) == 20
    assert found["overlaps"][data]["train"] == len(ours["train"])
    assert f"\n{other} " in shown(run_main, data, "--compare-with", other)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 500])
def test_examples_are_spread_evenly_over_the_training_documents(
    run_main, tmp_path, data, count
):
    expected = documents(data, "train")
    found = numbers(run_main, tmp_path, data, "--examples", count)["examples"]
    chosen = [example["document"] for example in found]
    assert len(chosen) == min(count, len(expected))
    # The middle of equal parts.
    ideal = (np.arange(len(chosen)) + 0.5) * len(expected) / max(1, len(chosen))
    assert chosen == np.floor(ideal).astype(int).tolist()
    for example in found:
        document = list(expected[example["document"]])
        assert example["tokens"] == len(document)
        if len(document) <= HEAD + TAIL:
            assert (example["head"], example["tail"]) == (document, [])
        else:
            assert (example["head"], example["tail"]) == (document[:HEAD], document[-TAIL:])


def test_examples_show_borders_escapes_and_bytes(run_main, data):
    out = shown(run_main, data, "--examples", 1)
    train = documents(data, "train")
    document = train[len(train) // 2]
    assert f"training document {len(train) // 2}: {len(document):,} tokens" in out
    tokens = [visible(bytes([byte])) for byte in document[:12]]
    assert {"<0xC3>", "<0xA9>", r"\n"} <= set(tokens)
    assert "│".join(tokens) in out
    assert "\x1b" not in out


def test_terminal_shows_colors_unless_they_are_unwanted(run_main, data, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = shown(run_main, data, "--examples", 1)
    assert "\x1b[" in out and "│" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in shown(run_main, data, "--examples", 1)


def test_tokens_of_a_bpe_are_shown_whole(run_main, tmp_path):
    tokenizer = write_kind("bpe_with_merges", tmp_path, begins=True)
    path = make(tmp_path / "set", ["</s>that"] * 3, tokenizer=tokenizer, validation_fraction=0)
    out = shown(run_main, path, "--examples", 1)
    # The quoted end token is spelled out.
    assert "<s>│</s│>│th│at│</s>\n" in out


def test_sets_without_counts_and_validation_are_shown(run_main, tmp_path):
    path = make(tmp_path / "set", TEXTS[:20], validation_fraction=0)
    manifest = read_manifest(path)
    splits = {
        name: dataclasses.replace(split, hashes=None) for name, split in manifest.splits.items()
    }
    write_manifest(path, dataclasses.replace(manifest, inputs=None, splits=splits))
    found = numbers(run_main, tmp_path, path)
    assert (found["inputs"], found["bytes_per_token"]) == (None, None)
    assert found["splits"]["validation"]["lengths"] is None
    out = shown(run_main, path)
    assert "input" not in out and "both splits" not in out
    row = next(line for line in out.splitlines() if line.startswith("validation"))
    assert row.split() == ["validation", "0", "-", "0", "-", "-", "-"]


def test_picture_is_written(run_main, tmp_path, data):
    file = tmp_path / "lengths.png"
    shown(run_main, data, "--picture", file)
    height, width, _ = matplotlib.image.imread(file).shape
    assert 500 < height < width
    assert [path.name for path in tmp_path.iterdir()] == ["lengths.png"]


@pytest.mark.parametrize("lengths", [[1], [2, 2], [3, 5000], [1, 2**32 - 1]])
def test_curves_in_the_picture_have_an_area_of_1(lengths):
    figure = length_figure(count_lengths(np.array(lengths, np.uint32)), "data/$any$")
    (plot,) = figure.axes
    assert plot.get_xscale() == "log"
    for stairs in plot.patches:
        values, edges, _ = stairs.get_data()
        assert np.sum(values * np.diff(np.log2(edges))) == pytest.approx(100)
    figure.canvas.draw()


MISTAKES = {
    "no data set": (["nowhere"], "'nowhere' has no manifest.json"),
    "nothing": ([], "directory must be given"),
    "unknown bucket": (["ftp://a/b"], "ftp://a/b is not on a disk"),
    "compared with nothing": (["{data}", "--compare-with", "nowhere"], "'nowhere' has no"),
    "picture": (["{data}", "--picture", "a.svg"], "--picture is a.svg; it must end in .png"),
    "directory": (["{data}", "--json", "no/a.json"], "there is no directory"),
    "examples": (["{data}", "--examples", "-1"], "examples is -1; it must be at least 0"),
    "config and set": (["{data}", "--config", "{config}"], "is not an option"),
    "no config": (["--config", "nowhere.py"], "nowhere.py"),
    "option of a set": (["--config", "{config}", "--examples", "3"], "--examples 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(run_main, tmp_path, data, world, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, message = MISTAKES[name]
    config = str(world.path / "config.py")
    code, out, errors = run_main(main, *(arg.format(data=data, config=config) for arg in args))
    assert (code, out) == (2, "")
    assert message in errors and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_damaged_counts_are_refused(run_main, tmp_path):
    path = make(tmp_path / "set", TEXTS[:20])
    file = Path(path, "inputs.jsonl")
    file.write_text(file.read_text().replace('"documents": ', '"documents": 1'))
    code, _, errors = run_main(main, path)
    assert code == 2 and "inputs.jsonl' has other counts than in the manifest" in errors


@pytest.fixture(scope="module")
def mixed(world, mixture):
    """The config of a run on three sources, in its own directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.path)
        patch.syspath_prepend(str(world.path))
        return read_config(mixture)


def first_batches(config, num_examples: int) -> list[bytes]:
    """Returns the tokens of the first examples, from the batches of training."""
    phases = expand(config)
    sources = open_train(config.data, 256, max(phase.seq_len for phase in phases))
    order = data_order(sources, config.seed, phases)
    found = []
    for phase in phases:
        batches = train_batches(
            sources,
            config.data,
            order,
            first_example=phase.start.examples,
            batch_size=phase.batch_size,
            accumulate=1,
            rows=slice(None),
            num_batches=phase.num_steps,
        )
        found += [row for batch in batches for row in batch.tokens[0].astype(np.uint8)]
    return [row.tobytes() for row in found[:num_examples]]


def test_first_examples_are_those_of_training(mixed):
    found = read_run_data(mixed).examples
    # All 64 examples of the first stage, and 32 of the second one.
    assert [each.example for each in found] == list(range(96))
    assert [each.seq_len for each in found] == [16] * 64 + [32] * 32
    for each, tokens in zip(found, first_batches(mixed, 96), strict=True):
        assert visible(tokens.replace(b"\0", b"<|endoftext|>")).startswith(each.text)


def test_epochs_are_those_of_the_examples(mixed):
    found = read_run_data(mixed)
    assert [(each.stage, each.seq_len, each.examples) for each in found.stages] == [
        (0, 16, 64),
        (1, 32, 32),
    ]
    assert [each.tokens for each in found.stages] == [1024, 1024]
    counts = Counter((each.seq_len, each.source) for each in found.examples)
    for index, source in enumerate(found.sources):
        read = [stage.epochs[index] * source.tokens for stage in found.stages]
        assert read == pytest.approx([n * counts[n, source.name] for n in (16, 32)])
        assert (source.tokens_read, source.epochs) == (sum(read), sum(read) / source.tokens)
        assert source.padding_share is source.max_epochs is None
    # The second stage has the weights 1, 3, 0.
    assert found.stages[1].epochs[2] == 0


def test_run_is_shown_with_overrides(run_main, tmp_path, world):
    args = ["--config", world.path / "config.py", "--data.max-epochs", "0.01"]
    out = shown(run_main, *args, "--stages.1.tokens", "4096", "--json", tmp_path / "run.json")
    assert "0.01, exceeded" in out
    assert "\nthe first examples: 100 of data\n" in out
    found = json.loads((tmp_path / "run.json").read_text())
    assert [stage["tokens"] for stage in found["stages"]] == [1024, 4096]
    assert found["sources"][0]["padding_share"] is None
    assert len(found["examples"]) == 100
    assert all(example["text"].rstrip() in out for example in found["examples"])


def test_padding_is_the_share_of_empty_places(run_main, tmp_path, world):
    args = ["--config", world.path / "config.py", "--data.packing", "best_fit"]
    found = numbers(run_main, tmp_path, *args)
    config = read_config(world.path / "config.py")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, packing="best_fit")
    )
    (source,) = open_train(config.data, 256)
    segments = np.stack([source[index][1] for index in range(len(source))])
    share = np.mean(segments == packing.PADDING)
    assert found["sources"][0]["padding_share"] == pytest.approx(share)
    assert f"{100 * share:.2f} %" in shown(run_main, *args)
    for example, tokens in zip(found["examples"], first_batches(config, 100), strict=True):
        text = visible(tokens.replace(b"\0", b"<|endoftext|>"))
        assert text.startswith(example["text"])
