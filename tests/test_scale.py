"""Scaling laws: planted laws, extrapolation, reports and errors."""

import dataclasses
import json
import math

import pytest
from conftest import tiny_model, tiny_run
from recorded import record_run, row, seam

from stackjax.analysis.reading import read_record
from stackjax.analysis.run_ends import fit_laws, gap_points
from stackjax.analysis.scaling_report import write
from stackjax.config import Stage
from stackjax.growth import Stack
from stackjax.options import ScaleConfig
from stackjax.scale import main

A, B, SPEEDUP = 40.0, -0.08, 0.5
FLOPS = {16: 1e15, 32: 1e16, 64: 1e17, 128: 1e18}
LENGTHS = (1e9, 3e9, 1e10, 1e11)


def write_end(path, *, dim=16, grown, flops, loss, seed=0, **fields):
    """Writes a run with a final loss."""
    stages = (Stage(tokens=640, batch_size=8),)
    rows = [row("train", 0, flops / 1e3, 5.0)]
    if grown:
        stages += (Stage(tokens=1280, batch_size=8, growth=Stack(2)),)
        rows.append(seam(1, flops / 100))
    last = len(stages) - 1
    rows += [row("evaluation", last, flops / 2, loss + 0.1)]
    rows += [row("evaluation", last, flops, loss)]
    model = tiny_model(num_layers=6, embed_dim=dim)
    config = dataclasses.replace(tiny_run(path, model=model), stages=stages, seed=seed)
    return record_run(path, config, rows, **fields)


def laws_of(*paths):
    return fit_laws([read_record(path) for path in paths], "held_out")


def law(flops, speedup=0.0):
    return A * (flops * (1 + speedup)) ** B


@pytest.fixture
def sizes(tmp_path):
    """Grown and scratch runs with four sizes, on exact laws."""
    return [
        write_end(tmp_path / f"{dim}-{s}", dim=dim, grown=s > 0, flops=at, loss=law(at, s))
        for dim, at in FLOPS.items()
        for s in (0.0, SPEEDUP)
    ]


@pytest.fixture
def lengths(tmp_path):
    """Runs with several lengths; the gap shrinks by 0.02 per tenfold tokens."""
    found = []
    for tokens in LENGTHS:
        flops = tokens * 1e6
        gap = 0.3 - 0.02 * math.log10(tokens)
        for name, loss in (("scratch", 2.0), ("grown", 2.0 - gap)):
            path = tmp_path / f"{name}-{tokens:.0f}"
            found.append(write_end(path, grown=name == "grown", flops=flops, loss=loss))
    return found


def test_planted_power_laws_are_recovered_and_extrapolated(sizes, tmp_path):
    printed = write(ScaleConfig(runs=tuple(sizes), flops=(1e21,), output=tmp_path / "out"))
    assert "no growth has runs of 3 lengths" in printed
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    scratch, grown = found["laws"]["scratch"], found["laws"]["stack(2)"]
    assert (scratch["a"], scratch["b"]) == pytest.approx((A, B), rel=1e-6)
    assert grown["a"] == pytest.approx(A * (1 + SPEEDUP) ** B, rel=1e-6)
    [extrapolated] = found["predicted"]
    assert extrapolated["value"] == pytest.approx(SPEEDUP, rel=1e-6)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "scale.md",
        "scale.json",
        "index.html",
        "laws.png",
    }


def test_planted_gap_law_is_extrapolated(lengths, tmp_path):
    printed = write(ScaleConfig(runs=tuple(lengths), output=tmp_path / "out"))
    assert "model sizes: scratch has 1, stack(2) has 1" in printed
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert found["gaps"]["stack(2)"]["q"] == pytest.approx(-0.02, rel=1e-6)
    last = found["predicted_gaps"][-1]
    assert last["tokens"] == 1000 * LENGTHS[-1]
    assert last["gap"] == pytest.approx(0.3 - 0.02 * 14, abs=1e-9)
    assert (tmp_path / "out" / "gap.png").exists()


def test_pairs_have_equal_seed_and_flops(lengths, tmp_path):
    more = [
        # Scratch runs with another seed, and with 10 % more FLOPs.
        write_end(tmp_path / "other", grown=False, flops=LENGTHS[0] * 1e6, loss=1.0, seed=1),
        write_end(tmp_path / "longer", grown=False, flops=1.1e6 * LENGTHS[0], loss=1.0),
    ]
    found = laws_of(*lengths, *more)
    assert len(found.pairs) == len(LENGTHS)
    for pair in found.pairs:
        assert pair.gap == pytest.approx(0.3 - 0.02 * math.log10(pair.scratch.tokens))


def test_extra_runs_do_not_prevent_a_law(sizes, tmp_path):
    extra = write_end(tmp_path / "extra", grown=True, flops=1e15, loss=3.0, seed=1)
    assert set(laws_of(*sizes, extra).power_laws) == {"scratch", "stack(2)"}


def test_grown_runs_with_shared_scratch_are_one_point(lengths, tmp_path):
    flops = LENGTHS[0] * 1e6
    again = write_end(tmp_path / "again", grown=True, flops=flops, loss=1.9)
    found = laws_of(*lengths, again)
    assert len(found.pairs) == len(LENGTHS) + 1
    assert len(gap_points(found.pairs)["stack(2)"]) == len(LENGTHS)


@pytest.mark.usefixtures("undrawn")
def test_unequal_runs_are_reported_with_the_field(sizes, lengths, tmp_path):
    other = {"stages.1.peak_learning_rate": 0.02}
    paths = [
        *sizes,
        write_end(tmp_path / "odd", grown=True, flops=1e15, loss=3, seed=1, **other),
    ]
    out = tmp_path / "out"
    printed = write(ScaleConfig(runs=tuple(paths), output=out))
    field = "last stage's peak_learning_rate is 0.01 in"
    assert f"{field} {sizes[0]} and 7 more; 0.02 in {paths[-1]}." in printed
    # Larger runs have more tokens per parameter.
    assert "tokens per parameter is" in printed
    found = json.loads((out / "scale.json").read_text())
    assert any(field in note for note in found["notes"])
    assert str(paths[-1]) in (out / "index.html").read_text()


def test_unusable_runs_are_refused_in_one_line(sizes, tmp_path, run_main):
    other = write_end(tmp_path / "other", grown=True, flops=1e15, loss=3.0, data="others")
    longer = {"stages.1.tokens": 10**10}
    unfinished = write_end(tmp_path / "short", grown=True, flops=1e15, loss=3.0, **longer)
    cases = [
        (sizes[:4], "scratch has 2, stack(2) has 2"),
        (sizes[1::2], "model sizes: stack(2) has 4"),
        ([*sizes, sizes[0]], "is listed twice"),
        ([*sizes, unfinished], "is unfinished"),
        ([*sizes, other], "data is others in "),
    ]
    for paths, message in cases:
        code, _, error = run_main(main, *paths)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
