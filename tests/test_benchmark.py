"""What a benchmark measures is there and adds up, and ends in JSON and in a page of tables."""

import dataclasses
import json
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import pytest
from conftest import tiny_model, tiny_run
from runs import ROOT

from scripts import benchmark as command
from scripts.benchmark import SECTIONS, BenchmarkConfig, benchmark
from scripts.measure import loop, machine
from scripts.measure.choices import variants
from scripts.measure.text import show
from scripts.performance import TABLES, PerformanceConfig, write
from stackjax import flops
from stackjax.config import DataConfig, Stage
from stackjax.growth import Learn, Stack
from stackjax.phases import expand

SEQ_LEN = 8
CPU = "no peak is known of 'cpu'"


def run_config(path, **fields):
    """A run of two stages whose data are not there."""
    data = DataConfig(path=str(path / "data"), seq_len=SEQ_LEN)
    model = tiny_model(num_layers=4)
    return tiny_run(path / "run", model=model, data=data, **fields)


def rows_of(options, config):
    benchmark(options, config)
    return json.loads(options.out.read_text())["rows"]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Fewer tokens and steps, so that the tests are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SYNTHETIC_TOKENS", 2**14)
        patch.setattr(loop, "BLOCK_STEPS", 2)
        patch.setattr(loop, "NUM_BLOCKS", 2)
        patch.setattr(loop, "LOOP_STEPS", 7)
        patch.setattr(machine, "_WIDTHS", (256,))
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A config, and the JSON file of everything that is measured of it."""
    path = tmp_path_factory.mktemp("benchmark")
    config, out = run_config(path), path / "all.json"
    options = BenchmarkConfig(config=path, steps=3, ablate=True, profile=path, out=out)
    benchmark(options, config)
    return config, out


def values_of(measured, section):
    """What was measured in a section of each phase that has it."""
    rows = json.loads(measured[1].read_text())["rows"]
    return {row["phase"]: row["values"] for row in rows if row["section"] == section}


def numbers(values):
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def test_every_section_of_every_phase_has_positive_numbers(measured):
    phases = {phase.directory for phase in expand(measured[0])}
    for section in ("model", "flops", "compile", "step", "choice", *SECTIONS):
        found = values_of(measured, section)
        assert set(found) == (phases - {"stage_0/train"} if section == "growth" else phases)
        for values in found.values():
            assert numbers(values)
            assert all(
                number > 0
                for name, number in numbers(values).items()
                # A difference of two times, which noise may turn around at this size.
                if name not in ("overhead_seconds", "share_of_step")
            ), values


def test_what_a_cpu_does_not_have_says_so(measured):
    for values in values_of(measured, "step").values():
        assert values["mfu"] == values["causal_mfu"] == {"not_measured": CPU}
        assert "does not count" in values["device_peak_bytes"]["not_measured"]


def test_times_and_rates_agree(measured):
    sizes, of_flops = values_of(measured, "model"), values_of(measured, "flops")
    for phase, times in values_of(measured, "step").items():
        tokens, median = sizes[phase]["tokens_per_step"], times["median_seconds"]
        together = times["back_to_back_seconds"]
        assert times["p10_seconds"] <= median <= times["p90_seconds"]
        assert times["tokens_per_second"] == pytest.approx(tokens / median)
        assert times["back_to_back_tokens_per_second"] == pytest.approx(tokens / together)
        rate = of_flops[phase]["palm_flops"] / median
        assert times["palm_flops_per_second"] == pytest.approx(rate)
    for times in values_of(measured, "growth").values():
        copies = times["median_seconds"] / times["copy_seconds"]
        assert times["copies"] == pytest.approx(copies)
    for times in values_of(measured, "checkpoint").values():
        assert times["stall_seconds"] <= times["on_disk_seconds"]


def test_flops_are_those_of_the_formulas(measured):
    for phase in expand(measured[0]):
        found, model = values_of(measured, "flops")[phase.directory], phase.model
        tokens = phase.per_step.tokens
        attention = model.num_layers * SEQ_LEN * model.num_heads * model.head_dim
        less = flops.num_params(model) - model.vocab_size * model.embed_dim
        assert found["six_nd_flops"] == tokens * flops.flops_6nd(model)
        assert found["matmul_flops"] == tokens * flops.matmul_flops(model, SEQ_LEN)
        assert found["palm_flops"] == tokens * (6 * less + 12 * attention)
        assert found["palm_causal_flops"] == tokens * (6 * less + 6 * attention)
        # The body of the scan, which XLA counts once, is most of the model.
        scanned = values_of(measured, "compile")[phase.directory]["xla_scanned_flops"]
        assert found["xla_flops"] > max(scanned, found["matmul_flops"])


def test_all_bytes_are_those_of_the_state(measured):
    for phase in expand(measured[0]):
        params = values_of(measured, "model")[phase.directory]["params"]
        padding = phase.model.padded_vocab_size - phase.model.vocab_size
        stored = params + 2 * padding * phase.model.embed_dim
        state = values_of(measured, "checkpoint")[phase.directory]["state_bytes"]
        # Parameters and two moments in float32, and two counts of steps.
        assert state == 4 * (3 * stored + 2)


def test_each_choice_is_measured_alone(measured):
    config, out = measured
    rows = json.loads(out.read_text())["rows"]
    for phase in expand(config):
        cases = [row["case"] for row in rows if row["section"] == "choice"]
    assert cases
    first = expand(config)[0]
    assert set(variants(config, first)) == {
        "as configured",
        "remat=dots",
        "remat=full",
        "scan_unroll=2",
    }
