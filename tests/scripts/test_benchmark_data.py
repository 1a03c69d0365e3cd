"""The benchmark of data: consistent rows, and their tables."""

import json
import shutil
from pathlib import Path

import pytest
from runs import ROOT

from scripts.benchmark_data import DataBenchmarkConfig, benchmark_data
from scripts.measure import machine, mixtures, preparation, shards
from scripts.measure.text import show
from scripts.performance import TABLES, PerformanceConfig, write

TEXTS = [(f"{n}.py", f"def function_{n}(x):\n    return x + {n}\n" * 50) for n in range(40)]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Reduces tokens and texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SYNTHETIC_TOKENS", 2**13)
        patch.setattr(mixtures, "BATCH_TOKENS", 2**8)
        patch.setattr(mixtures, "TURN_BATCHES", 1)
        patch.setattr(preparation, "VOCAB_SIZE", 280)
        patch.setattr(preparation, "list_documents", lambda _: iter(TEXTS))
        patch.setattr(machine, "_WIDTHS", (256,))
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The JSON file of all measurements."""
    out = tmp_path_factory.mktemp("benchmark") / "data.json"
    benchmark_data(DataBenchmarkConfig(seq_lens=(64,), turns=2, copies=2, out=out))
    return out


def rows_of(out, section):
    rows = json.loads(out.read_text())["rows"]
    return {row["case"]: row["values"] for row in rows if row["section"] == section}


def test_every_mixture_is_read_with_both_packings(measured):
    found = rows_of(measured, "mixtures")
    expected = [f"T = 64, {p}, {m}" for p in ("joined", "best_fit") for m in mixtures.WEIGHTS]
    assert list(found) == expected
    assert all(value > 0 for values in found.values() for value in values.values())
    assert found[expected[0]]["of_one_source"] == 1


def test_preparation_is_compared_on_all_copies(measured):
    values = rows_of(measured, "preparation")[""]
    assert values["text_bytes"] == 2 * sum(len(text) for _, text in TEXTS)
    assert all(value > 0 for value in values.values())


def test_page_has_the_tables_of_data(measured, tmp_path):
    page = Path(shutil.copy(ROOT / "docs" / "performance.md", tmp_path))
    write(PerformanceConfig(results=(measured,), page=page))
    for name in ("mixtures", "preparation"):
        inside = page.read_text().split(f"<!-- begin {name} -->\n")[1].split("<!-- end")[0]
        last = inside.splitlines()[-1]
        assert last.startswith("| data ")
        values = list(rows_of(measured, name).values())[-1]
        for column in TABLES[name].columns.values():
            field = column.split(".")[1]
            assert f" {show(field, values[field])} " in last
    assert "- **data**: `python -m scripts.benchmark_data" in page.read_text()


def test_preparation_may_be_left_out(tmp_path):
    out = tmp_path / "data.json"
    benchmark_data(DataBenchmarkConfig(seq_lens=(), copies=0, out=out))
    assert [row["section"] for row in json.loads(out.read_text())["rows"]] == ["machine"]


def test_output_without_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--out is .*, but there is no directory"):
        benchmark_data(DataBenchmarkConfig(out=tmp_path / "no" / "x.json"))
