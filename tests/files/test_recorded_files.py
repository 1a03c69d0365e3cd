"""Damaged JSON records: run configs, benchmarks and tokenizers."""

import itertools
import json
from functools import reduce

import pytest
from conftest import tiny_run
from recorded import record_run, row, seam

from scripts.performance import TABLES, PerformanceConfig
from scripts.performance import write as write_page
from stackjax.analysis.reading import read_record
from stackjax.analysis.settings import provenance, settings
from stackjax.analysis.throughput import read_benchmark
from stackjax.inference.saved_model import SavedCheckpoint
from stackjax.runtime.errors import UserError

REMOVED = object()
ODD_VALUES = (REMOVED, None, "x", -1, 2**70, 1.5, [], True, "stack(0)")
ROWS = [
    row("train", 0, 1e14, 5.0),
    seam(1, 5e14),
    *(
        row(kind, 1, n * 1e15, 4.0 - n / 10)
        for n in (1, 2, 3)
        for kind in ("train", "evaluation")
    ),
]


def replaced(fields, names, value):
    """Returns a copy of nested JSON with a value replaced or removed."""
    copied = json.loads(json.dumps(fields))
    *parents, last = names
    parent = reduce(lambda found, name: found[name], parents, copied)
    if value is REMOVED:
        del parent[last]
    else:
        parent[last] = value
    return copied


def test_damaged_config_record_is_named_or_harmless(tmp_path):
    run = record_run(tmp_path / "run", tiny_run(), ROWS)
    file = run / "config.json"
    whole = json.loads(file.read_text())
    refused = set()
    # Each field has two odd values; over all fields, every value occurs often.
    for name, value in zip([*whole["config"]] * 2, itertools.cycle(ODD_VALUES), strict=False):
        file.write_text(json.dumps(replaced(whole, ("config", name), value)))
        try:
            record = read_record(run)
            record.curve("held_out")
            assert record.training and settings(record) and provenance([record])
            assert record.is_finished in (True, False)
        except UserError as error:
            assert str(error).startswith(str(run)), (name, value, str(error))
            refused.add(name)
    assert {"seed", "data.path", "model.num_layers", "stages.1.growth"} <= refused


@pytest.mark.parametrize("name", ["model.color", "model.rope_scaling.color", "stages.7.growth"])
def test_unknown_field_in_a_recorded_model_is_named(tmp_path, name):
    run = record_run(tmp_path / "run", tiny_run(), ROWS)
    file = run / "config.json"
    file.write_text(json.dumps(replaced(json.loads(file.read_text()), ("config", name), 1)))
    with pytest.raises(UserError, match=r"config\.json (is damaged|lacks)"):
        read_record(run)


SECTIONS = {"model": ["num_layers", "seq_len"], "step": [], "compile": []}
for column in TABLES["steps"].columns.values():
    section, field = column.split(".")
    SECTIONS[section].append(field)
MEASURED = {
    "num_devices": 8,
    "command": "python -m scripts.benchmark",
    "date": "2026-01-01",
    "versions": {"jax": "0.10.2"},
    "platform": "cpu",
    "device_kind": "cpu",
    "num_cores": 2,
    "cpu": "a processor",
    "XLA_FLAGS": "",
    "GLIBC_TUNABLES": "",
    "LD_PRELOAD": "",
    "rows": [
        {
            "section": "machine",
            "phase": "",
            "case": "",
            "values": {"matmul_flops_per_second": 1e12, "copy_bytes_per_second": 1e9},
        },
        *(
            {
                "section": section,
                "phase": "stage_0/train",
                "case": "",
                "values": {field: 8 for field in fields},
            }
            for section, fields in SECTIONS.items()
        ),
    ],
}


def paths_in(value, names=()):
    """Yields the path to each value in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        yield (*names, name)
        if isinstance(item, dict | list):
            yield from paths_in(item, (*names, name))


def test_damaged_benchmark_is_named_or_harmless(tmp_path):
    file, page = tmp_path / "benchmark.json", tmp_path / "page.md"
    tables = ["machines", *TABLES]
    page.write_text("\n".join(f"<!-- begin {n} -->\n<!-- end {n} -->" for n in tables))
    file.write_text(json.dumps(MEASURED))
    assert read_benchmark(file).rates == {(8, 8, 8): 1.0}
    write_page(PerformanceConfig(results=(file,), page=page))
    for names in paths_in(MEASURED):
        for value in ODD_VALUES:
            file.write_text(json.dumps(replaced(MEASURED, names, value)))
            for read in (
                lambda: read_benchmark(file),
                lambda: write_page(PerformanceConfig(results=(file,), page=page)),
            ):
                try:
                    read()
                except UserError as error:
                    assert str(error).startswith(f"{file} is damaged: "), (names, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", r"it is \[\]"),
        ('{"name": "bytes"}', "digest is missing"),
        (
            '{"name": 3, "digest": "", "vocab_size": 1, "end_id": 1}',
            "name is 3, which is not a text",
        ),
        (
            '{"name": "bytes", "digest": "", "vocab_size": 1, "end_id": 1, "color": 1}',
            "color is not a known field",
        ),
    ],
)
def test_damaged_tokenizer_info_is_named(tmp_path, text, message):
    checkpoint = tmp_path / "stage_0" / "train" / "3"
    checkpoint.mkdir(parents=True)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "info.json").write_text(text)
    with pytest.raises(UserError, match=rf"info\.json is damaged: {message}.*--tokenizer"):
        SavedCheckpoint(checkpoint, None).tokenization  # noqa: B018
