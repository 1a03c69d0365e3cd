"""Benchmarks: consistent measurements, JSON results and the page of tables."""

import dataclasses
import json
import re
import shutil
import types
from pathlib import Path

import jax
import pytest
from conftest import tiny_model, tiny_run
from runs import ROOT

from scripts import benchmark as command
from scripts.benchmark import SECTIONS, BenchmarkConfig, benchmark
from scripts.measure import choices as module_of_choices
from scripts.measure import loop, machine, shards
from scripts.measure.choices import variants
from scripts.measure.text import show
from scripts.performance import TABLES, PerformanceConfig, write
from stackjax.data.config import DataConfig, SourceConfig
from stackjax.growth import Learn
from stackjax.model import flops
from stackjax.training.expand import expand

SEQ_LEN = 8
CPU = "no peak is known of 'cpu'"


def run_config(path):
    """Returns a run with two stages and a missing data path."""
    data = DataConfig(path=str(path / "data"), seq_len=SEQ_LEN)
    model = tiny_model(num_layers=4)
    return tiny_run(path / "run", model=model, data=data)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Reduces steps and tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SYNTHETIC_TOKENS", 2**14)
        patch.setattr(loop, "BLOCK_STEPS", 2)
        patch.setattr(loop, "NUM_BLOCKS", 2)
        patch.setattr(loop, "LOOP_STEPS", 7)
        patch.setattr(machine, "_WIDTHS", (256,))
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A config, and the JSON file with all measurements of the second phase."""
    path = tmp_path_factory.mktemp("benchmark")
    config, out = run_config(path), path / "all.json"
    options = BenchmarkConfig(
        config=path, phases=(1,), steps=3, ablate=True, profile=path / "trace", out=out
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of_choices, "choices", lambda *_: {"loss_chunk": (2 * SEQ_LEN,)})
        benchmark(options, config)
    return config, out


def rows_of(out):
    return json.loads(out.read_text())["rows"]


def numbers(values):
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


@pytest.fixture(scope="module")
def values(measured):
    """Measured values by section; the last case of each section."""
    return {row["section"]: row["values"] for row in rows_of(measured[1])}


@pytest.fixture(scope="module")
def phase(measured):
    return expand(measured[0])[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "section", ["machine", "model", "flops", "compile", "choice", *SECTIONS]
)
def test_every_section_has_positive_numbers(values, section):
    # Time differences may be negative at this size.
    differences = ("overhead_seconds", "share_of_step", "saved_seconds")
    found = numbers(values[section])
    assert found
    for name, number in found.items():
        assert number > 0 or name in differences or name == "temporary_bytes", name


@pytest.mark.slow
def test_numbers_unknown_on_a_cpu_have_a_reason(values):
    reason = {"not_measured": "no peak is known of 'cpu'"}
    assert values["step"]["mfu"] == values["step"]["causal_mfu"] == reason
    assert "does not count" in values["step"]["device_peak_bytes"]["not_measured"]


@pytest.mark.slow
def test_rates_match_times(values, phase):
    step, tokens = values["step"], phase.per_step.tokens
    assert step["p10_seconds"] <= step["median_seconds"] <= step["p90_seconds"]
    together = tokens / step["back_to_back_seconds"]
    assert step["tokens_per_second"] == pytest.approx(tokens / step["median_seconds"])
    assert step["back_to_back_tokens_per_second"] == pytest.approx(together)
    rate = values["flops"]["palm_flops"] / step["median_seconds"]
    assert step["palm_flops_per_second"] == pytest.approx(rate)
    growth, host = values["growth"], values["host"]
    assert growth["copies"] * growth["copy_seconds"] == pytest.approx(growth["median_seconds"])
    assert host["overhead_seconds"] == host["loop_seconds"] - host["bare_seconds"]
    overhead = host["share_of_step"] * step["median_seconds"]
    assert overhead == pytest.approx(host["overhead_seconds"])
    assert values["checkpoint"]["stall_seconds"] <= values["checkpoint"]["on_disk_seconds"]


@pytest.mark.slow
def test_flops_match_formulas(values, phase):
    found, model, tokens = values["flops"], phase.model, phase.per_step.tokens
    attention = model.num_layers * SEQ_LEN * model.num_heads * model.head_dim
    rest = flops.num_params(model) - model.vocab_size * model.embed_dim
    assert found["six_nd_flops"] == tokens * flops.flops_6nd(model)
    assert found["matmul_flops"] == tokens * flops.matmul_flops(model, SEQ_LEN)
    assert found["palm_flops"] == tokens * (6 * rest + 12 * attention)
    assert found["palm_causal_flops"] == tokens * (6 * rest + 6 * attention)
    # XLA also counts the norms, the softmax and the update.
    assert found["xla_flops"] > found["matmul_flops"]


@pytest.mark.slow
def test_bytes_match_the_state(measured, values, phase):
    model = phase.model
    padding = 2 * (model.padded_vocab_size - model.vocab_size) * model.embed_dim
    stored = 4 * (flops.num_params(model) + padding)
    grown = {
        row["case"]: row["values"]["grown_bytes"]
        for row in rows_of(measured[1])
        if row["section"] == "growth"
    }
    # State and optimizer each have a step count with four bytes.
    assert grown == {
        "parameters": stored + 4,
        "reset": 3 * stored + 8,
        "grow": 3 * stored + 8,
    }
    assert values["checkpoint"]["state_bytes"] == grown["reset"]


@pytest.mark.slow
def test_choice_without_effect_needs_equal_memory(measured):
    rows = [row for row in rows_of(measured[1]) if row["section"] in ("compile", "choice")]
    assert [row["case"] for row in rows] == ["", "as configured", f"loss_chunk={2 * SEQ_LEN}"]
    assert len({row["values"]["temporary_bytes"] for row in rows}) == 1


def test_each_choice_changes_a_single_field(tmp_path):
    data = DataConfig(path="data", seq_len=128)
    config = tiny_run(tmp_path, data=data, model=tiny_model(num_layers=8, remat="dots"))
    phase = expand(config)[1]
    found = variants(config, phase)
    assert list(found) == [
        "as configured",
        "remat=none",
        "remat=lean",
        "remat=full",
        "scan_unroll=2",
        "scan_unroll=8",
        "loss_chunk=64",
    ]
    for name, variant in found.items():
        old, new = vars(phase.model), vars(variant.model)
        changed = [f"{field}={new[field]}" for field in new if new[field] != old[field]]
        assert changed == [name] * (name != "as configured")


@pytest.mark.slow
def test_file_has_command_and_versions_and_trace_exists(measured):
    _, out = measured
    report = json.loads(out.read_text())
    assert report["versions"]["jax"] == jax.__version__
    assert (report["platform"], report["num_devices"]) == ("cpu", jax.device_count())
    assert report["config"]["data.seq_len"] == SEQ_LEN
    assert {"command", "date", "cpu", "num_cores", "XLA_FLAGS"} <= report.keys()
    assert list(out.parent.glob("trace/stage_1/train/**/*.xplane.pb"))
    # The benchmark leaves no run directory.
    assert not list(out.parent.glob("run*"))


def measure(config, path, *sections, **fields):
    """Returns the values in the JSON file by section and case."""
    out = path / "part.json"
    benchmark(BenchmarkConfig(config=path, sections=sections, out=out, **fields), config)
    return {(row["section"], row["case"]): row["values"] for row in rows_of(out)}


@pytest.mark.slow
def test_insufficient_memory_is_a_reason_for_missing_numbers(tmp_path, monkeypatch):
    memory = types.SimpleNamespace(available=8 * 2**10)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(module_of_choices, "choices", lambda *_: {})
    sections = ("growth", "checkpoint", "step")
    found = measure(run_config(tmp_path), tmp_path, *sections, phases=(1,), ablate=True)
    reason = "needs 0.0 GiB on each device, which has 0.0 GiB free"
    for key, what in {
        ("growth", "parameters"): "growing",
        ("growth", "grow"): "growing",
        ("checkpoint", ""): "a state with its copy",
        ("step", ""): "a step",
        ("choice", "as configured"): "a step",
    }.items():
        assert found[key] == {"not_measured": f"{what} {reason}"}
    # Compilation needs no device memory.
    assert found["compile", ""]["program_bytes"] > 2**10


def test_slow_steps_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(module_of_choices, "choices", lambda *_: {})
    fields = {"phases": (1,), "steps": 2**20, "limit_seconds": 1e-6, "ablate": True}
    found = measure(run_config(tmp_path), tmp_path, "step", **fields)
    for key, steps in {("step", ""): 2**21, ("choice", "as configured"): 2**20}.items():
        reason = (
            rf"{steps + 3} steps of at least \S+ s each are more than --limit-seconds 1e-06"
        )
        assert re.fullmatch(reason, found[key]["not_measured"])


def test_fit_phase_has_a_reason_for_missing_numbers(tmp_path):
    config = run_config(tmp_path)
    learned = dataclasses.replace(config.stages[1], growth=Learn(factor=2, fit_steps=3))
    config = dataclasses.replace(config, stages=(config.stages[0], learned))
    fit = measure(config, tmp_path, "growth", "step", phases=(1,))
    assert "fits a learned growth" in fit["step", ""]["not_measured"]
    assert ("growth", "reset") not in fit
    train = measure(config, tmp_path, "growth", phases=(2,))
    assert "no operator grows" in train["growth", "parameters"]["not_measured"]


def test_loader_reads_the_config_shards_if_they_exist(tmp_path):
    config = run_config(tmp_path)
    shards.write_synthetic(tmp_path, config.model.vocab_size, SEQ_LEN)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, path=str(tmp_path))
    )
    found = measure(config, tmp_path, "loader", phases=(0,))["loader", ""]
    assert found["source"] == str(tmp_path)


def test_mixture_without_data_is_measured_on_synthetic_shards(tmp_path):
    config = run_config(tmp_path)
    sources = tuple(SourceConfig(name=name, path=str(tmp_path / name)) for name in "ab")
    data = dataclasses.replace(config.data, path=None, sources=sources)
    config = dataclasses.replace(config, data=data)
    found = measure(config, tmp_path, "loader", "host", phases=(1,))
    assert found["loader", ""]["source"] == "synthetic"
    assert found["host", ""]["loop_seconds"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sections": ("stp",)}, "--sections has 'stp', which is none of loader, growth"),
        ({"phases": (2,)}, "--phases has 2; those of the run are 0 to 1"),
        ({"steps": 0}, "steps is 0"),
        ({"out": Path("no/such/x.json")}, "--out is no/such/x.json, but there is no directory"),
    ],
)
def test_invalid_option_is_refused_with_field_and_value(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        benchmark(BenchmarkConfig(config=tmp_path, **fields), run_config(tmp_path))


def test_invalid_option_is_one_line(world, monkeypatch, run_main):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    args = ("--sections", "stp", "--model.num-layers", "4")
    code, _, error = run_main(command.main, world.path / "config.py", *args)
    assert code == 2
    assert re.fullmatch(r"error: --sections has 'stp'.*\n", error)


@pytest.fixture
def page(tmp_path):
    return Path(shutil.copy(ROOT / "docs" / "performance.md", tmp_path))


@pytest.mark.slow
def test_page_has_every_table(measured, values, page):
    write(PerformanceConfig(results=(measured[1],), page=page))
    text = page.read_text()
    for name, table in TABLES.items():
        inside = text.split(f"<!-- begin {name} -->\n")[1].split(f"<!-- end {name} -->")[0]
        if name in ("accelerators", "mixtures", "preparation"):
            assert inside == "not measured\n"
            continue
        lines = inside.splitlines()
        assert lines[0].startswith(f"|  | {next(iter(table.columns))} |")
        section, field = next(iter(table.columns.values())).split(".")
        assert lines[-1].startswith("| all stage_1 ")
        assert f" {show(field, values[section][field])} " in lines[-1]
    assert "- **all**: `python -m scripts.benchmark" in text
    # A second write changes nothing.
    write(PerformanceConfig(results=(measured[1],), page=page))
    assert page.read_text() == text


@pytest.mark.slow
def test_accelerators_have_a_separate_table(measured, page, tmp_path):
    report = json.loads(measured[1].read_text()) | {"platform": "gpu"}
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    write(PerformanceConfig(results=(tmp_path / "gpu.json",), page=page))
    text = page.read_text()
    assert "<!-- begin steps -->\nnot measured\n" in text
    table = text.split("<!-- begin accelerators -->\n")[1]
    assert "not measured: no peak is known of 'cpu'" in table.split("<!--")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not JSON"),
        ("[]", r"it is \[\]"),
        ('{"row": []}', "command is None, which is not a text"),
    ],
)
def test_damaged_result_is_refused(tmp_path, page, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json is damaged: {message}.*of scripts\.bench"):
        write(PerformanceConfig(results=(tmp_path / "x.json",), page=page))


@pytest.mark.slow
def test_page_without_markers_is_refused(measured, page):
    page.write_text(page.read_text().replace("<!-- end growth -->", ""))
    with pytest.raises(ValueError, match=r"must have one <!-- begin growth --> and one"):
        write(PerformanceConfig(results=(measured[1],), page=page))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("median_seconds", 0.0123, "12.3 ms"),
        ("median_seconds", 4.5e-5, "45.0 us"),
        ("median_seconds", 123.4, "123 s"),
        ("state_bytes", 3 * 2**30, "3.00 GiB"),
        ("state_bytes", 0, "0 KiB"),
        ("palm_flops_per_second", 5.1e14, "510 TFLOP/s"),
        ("copy_bytes_per_second", 1.2e10, "12 GB/s"),
        ("tokens_per_second", 12345.6, "12,346"),
        ("mfu", 0.512, "51.2 %"),
        ("params", 183744, "183,744"),
        ("mfu", {"not_measured": "why"}, "not measured: why"),
    ],
)
def test_numbers_have_units(name, value, text):
    assert show(name, value) == text
