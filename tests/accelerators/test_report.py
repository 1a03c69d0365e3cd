"""The report of `stackjax fit`, and changes with which a program fits."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from conftest import tiny_run

from stackjax.accelerators import fit as fit_module
from stackjax.accelerators import remedies
from stackjax.accelerators.bounds import time_bounds
from stackjax.accelerators.costs import Collective, Costs
from stackjax.accelerators.devices import parse_devices
from stackjax.accelerators.fit import fit
from stackjax.accelerators.measure import Machine, Measured
from stackjax.accelerators.programs import programs, step_program
from stackjax.accelerators.remedies import candidates, way_out
from stackjax.accelerators.report import notes, table, to_json
from stackjax.accelerators.speeds import Speeds
from stackjax.options import FitConfig
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand

GIB = 2**30
COSTS = Costs(
    dot_flops=8e12,
    attention_flops=4e12,
    computed_attention_flops=2e12,
    forward_kernels=24,
    traffic=3e12,
    elementwise_traffic=1e12,
    host_bytes=5e9,
    collectives=(
        Collective(
            kind="all-gather",
            is_synchronous=False,
            crosses_hosts=False,
            calls=3,
            wire_bytes=10**11,
        ),
        Collective(
            kind="all-reduce",
            is_synchronous=True,
            crosses_hosts=True,
            calls=1,
            wire_bytes=10**10,
        ),
    ),
    unknown_loops=0,
)
SPEEDS = Speeds(
    peak=1e13, memory=1e12, wire=1e11, network=1e10, host=1e10, products=0.8, attention=0.5
)
FITS = Measured(
    name="stage 1 step",
    compute_dtype="bfloat16",
    attention="cudnn",
    attention_reason="the fastest kernel",
    compile_seconds=12.0,
    usable_bytes=60 * GIB,
    argument_bytes=2 * GIB,
    peak_bytes=22 * GIB,
    model_flops=1e13,
    costs=COSTS,
    bounds=time_bounds(COSTS, SPEEDS),
    mfu=0.5,
)
TOO_LARGE = dataclasses.replace(FITS, peak_bytes=61 * GIB)
REFUSED = Measured(
    name="stage 1 step",
    compute_dtype="bfloat16",
    attention="splash",
    attention_reason="the fastest kernel",
    compile_seconds=12.0,
    usable_bytes=15 * GIB,
    refusal="RESOURCE_EXHAUSTED: Ran out of memory on HBM.",
)


def test_bounds_add_up_the_assumed_times():
    bounds = time_bounds(COSTS, SPEEDS)
    assert (bounds.flops, bounds.memory, bounds.wire) == (1.0, 3.0, 2.0)
    assert bounds.estimate == pytest.approx(8 / 8 + 2 / 5 + 1 / 0.85 + 1.0 + 0.1 + 0.5)


def test_table_has_memory_wire_flops_and_bounds_of_every_program():
    head, units, *rows = table([FITS, REFUSED]).splitlines()
    assert len(rows) == 2 and "sync wire" in head and units.split()[0] == "GiB"
    assert rows[0].split()[3:6] == ["2.00", "22.00", "38.00"]
    assert rows[0].split()[8:11] == ["10.0", "110.0", "1.200"]
    assert "too large" in rows[1]


def test_notes_list_kernels_and_collectives_by_kind():
    text = notes([FITS, REFUSED])
    assert "cudnn attention: the fastest kernel" in text and "24 forward kernels" in text
    assert "3 asynchronous all-gather: 100 GB" in text
    assert "1 synchronous all-reduce between hosts or slices: 10 GB" in text
    assert "stage 1 step: 5 GB to and from the host's memory" in text
    assert "RESOURCE_EXHAUSTED" in text


def test_json_has_every_number():
    found = json.loads(to_json("run.py", parse_devices("h100:8"), [FITS, TOO_LARGE, REFUSED]))
    assert (found["config"], found["devices"]) == ("run.py", "h100:8")
    assert [row["fits"] for row in found["programs"]] == [True, False, False]
    first = found["programs"][0]
    assert first["peak_bytes"] == 22 * GIB and first["mfu"] == 0.5
    assert first["costs"]["collectives"][1]["wire_bytes"] == 10**10


def test_programs_are_every_step_growth_and_evaluation_once():
    config = tiny_run()
    found = programs(config, expand(config))
    names = [program.name for program in found]
    assert names[:2] == ["stage 0 step", "stage 0 evaluation"]
    assert len(set(names)) == len(names) and "stage 1 growth" in names


def two_devices():
    return jax.devices()[:2]


def test_candidates_for_a_step_split_the_batch_and_then_save_activations():
    config = tiny_run()
    phase = dataclasses.replace(expand(config)[0], batch_size=8, accumulate=1)
    changes = [
        each.change for each in candidates(config, step_program(config, phase), two_devices())
    ]
    assert changes == [
        "--stages.0.accumulate 2",
        "--stages.0.accumulate 4",
        "--stages.0.accumulate 4 --stages.0.remat dots",
        "--stages.0.accumulate 4 --stages.0.remat lean",
        "--stages.0.accumulate 4 --stages.0.remat full",
    ]


def test_last_candidate_for_a_step_on_gpus_has_moments_on_the_host(monkeypatch):
    monkeypatch.setattr(remedies, "platform_of", lambda device: "gpu")
    config = tiny_run()
    program = step_program(config, expand(config)[0])
    *_, last = candidates(config, program, two_devices())
    assert last.change.endswith(" --stages.0.remat full --stages.0.moment-memory host")
    phase = last.program.phase
    assert (phase.model.remat, phase.moment_memory) == ("full", "host")


def machine(memory: int) -> Machine:
    """Returns two devices in place of two GPUs, without a compiler."""
    return Machine(group=parse_devices("h100:2"), devices=two_devices(), memory=memory)


@pytest.mark.parametrize(("fitting", "said"), [(2, "accumulate 2 fits"), (99, "more devices")])
def test_way_out_is_the_first_candidate_that_fits(monkeypatch, fitting, said):
    def measure(config, program, machine):
        return FITS if program.phase.accumulate >= fitting else TOO_LARGE

    monkeypatch.setattr(remedies, "measure", measure)
    config = tiny_run()
    phase = dataclasses.replace(expand(config)[0], batch_size=64, accumulate=1)
    assert said in way_out(config, step_program(config, phase), machine(60 * GIB))


def test_run_that_does_not_fit_is_reported_and_refused_in_one_line(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(fit_module, "describe_machine", lambda *_: machine(60 * GIB))
    monkeypatch.setattr(fit_module, "num_slices_of", lambda devices: 1)
    monkeypatch.setattr(fit_module, "check_backend", lambda config, device: None)
    monkeypatch.setattr(fit_module, "measure", lambda config, program, machine: TOO_LARGE)
    monkeypatch.setattr(fit_module, "report", lambda name, machine, rows: table(rows))
    monkeypatch.setattr(fit_module, "way_out", lambda *_: "--stages.0.accumulate 2 fits")
    options = FitConfig(devices="h100:8", json=tmp_path / "fit.json")
    with pytest.raises(UserError, match=r"61\.00 GiB.*60\.00 GiB; --stages\.0\.accumulate 2"):
        fit(tiny_run(), options, Path("run.py"))
    assert "stage 1 step" in capsys.readouterr().out
    assert json.loads((tmp_path / "fit.json").read_text())["devices"] == "h100:2"
