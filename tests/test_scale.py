"""Laws over the ends of runs are those that the runs were made with."""

import dataclasses
import json
import math

import pytest
from conftest import tiny_model, tiny_run
from recorded import record_run, row, seam

from stackjax.analysis.run_ends import gap_points
from stackjax.analysis.scaling_report import find, write
from stackjax.config import Stage
from stackjax.growth import Stack
from stackjax.options import ScaleConfig
from stackjax.scale import main

A, B, SPEEDUP = 40.0, -0.08, 0.5
FLOPS = {16: 1e15, 32: 1e16, 64: 1e17, 128: 1e18}
LENGTHS = (1e9, 3e9, 1e10, 1e11)


def write_end(path, *, dim=16, grown, flops, loss, seed=0, **fields):
    """A run that ends at a loss."""
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


def law(flops, speedup=0.0):
    return A * (flops * (1 + speedup)) ** B


@pytest.fixture
def sizes(tmp_path):
    """Four sizes, grown and from scratch, on exact laws."""
    return [
        write_end(tmp_path / f"{dim}-{s}", dim=dim, grown=s > 0, flops=at, loss=law(at, s))
        for dim, at in FLOPS.items()
        for s in (0.0, SPEEDUP)
    ]


@pytest.fixture
def lengths(tmp_path):
    """One size, ever longer, whose gap closes by 0.02 for each tenfold of tokens."""
    found = []
    for tokens in LENGTHS:
        flops = tokens * 1e6
        gap = 0.3 - 0.02 * math.log10(tokens)
        for name, loss in (("scratch", 2.0), ("grown", 2.0 - gap)):
            path = tmp_path / f"{name}-{tokens:.0f}"
            found.append(write_end(path, grown=name == "grown", flops=flops, loss=loss))
    return found


def test_laws_of_several_sizes_and_what_they_foretell_are_the_planted_ones(sizes, tmp_path):
    printed = write(ScaleConfig(runs=tuple(sizes), flops=(1e21,), output=tmp_path / "out"))
    assert "Not fitted: no growth has runs of three lengths for one size" in printed
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    scratch, grown = found["laws"]["scratch"], found["laws"]["stack(2)"]
    assert (scratch["a"], scratch["b"]) == pytest.approx((A, B), rel=1e-6)
    assert grown["a"] == pytest.approx(A * (1 + SPEEDUP) ** B, rel=1e-6)
    [foretold] = found["foretold"]
    assert foretold["value"] == pytest.approx(SPEEDUP, rel=1e-6)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "scale.md",
        "scale.json",
        "index.html",
        "laws.png",
    }


def test_the_gap_of_one_size_goes_on_as_planted(lengths, tmp_path):
    printed = write(ScaleConfig(runs=tuple(lengths), output=tmp_path / "out"))
    assert "Not fitted: of sizes, scratch is of 1, stack(2) is of 1; a law of loss" in printed
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert found["gaps"]["stack(2)"]["q"] == pytest.approx(-0.02, rel=1e-6)
    last = found["gaps_foretold"][-1]
    assert last["tokens"] == 1000 * LENGTHS[-1]
    assert last["gap"] == pytest.approx(0.3 - 0.02 * 14, abs=1e-9)
    assert (tmp_path / "out" / "gap.png").exists()


def test_pairs_are_of_one_seed_and_of_equal_flops(lengths, tmp_path):
    more = [
        # Scratch of another seed, and one that cost a tenth more.
        write_end(tmp_path / "other", grown=False, flops=LENGTHS[0] * 1e6, loss=1.0, seed=1),
        write_end(tmp_path / "longer", grown=False, flops=1.1e6 * LENGTHS[0], loss=1.0),
    ]
    found = find(ScaleConfig(runs=(*lengths, *more)))
    assert len(found.pairs) == len(LENGTHS)
    for pair in found.pairs:
        assert pair.gap == pytest.approx(0.3 - 0.02 * math.log10(pair.scratch.tokens))


def test_growths_that_lack_sizes_or_lengths_do_not_take_the_others_their_law(sizes, tmp_path):
    stray = write_end(tmp_path / "stray", grown=True, flops=1e15, loss=3.0, seed=1)
    stray = dict(runs=(*sizes, stray))
    assert set(find(ScaleConfig(**stray)).laws) == {"scratch", "stack(2)"}


def test_grown_runs_that_share_a_run_from_scratch_are_one_point(lengths, tmp_path):
    flops = LENGTHS[0] * 1e6
    again = write_end(tmp_path / "again", grown=True, flops=flops, loss=1.9)
    found = find(ScaleConfig(runs=(*lengths, again)))
    assert len(found.pairs) == len(LENGTHS) + 1
    assert len(gap_points(found.pairs)["stack(2)"]) == len(LENGTHS)


def test_runs_of_one_law_that_are_not_alike_are_named_with_the_field(sizes, lengths, tmp_path):
    other = {"stages.1.peak_learning_rate": 0.02}
    paths = [
        *sizes,
        write_end(tmp_path / "odd", grown=True, flops=1e15, loss=3, seed=1, **other),
    ]
    out = tmp_path / "out"
    printed = write(ScaleConfig(runs=tuple(paths), output=out))
    field = "last stage's peak_learning_rate is 0.01 in"
    assert f"Not alike: {field} {sizes[0]} and 7 more; 0.02 in {paths[-1]}." in printed
    # Ever larger runs have ever more tokens for each parameter here.
    assert "scratch: Not alike: tokens per parameter is" in printed
    found = json.loads((out / "scale.json").read_text())
    assert any(field in note for note in found["notes"])
    assert str(paths[-1]) in (out / "index.html").read_text()


def test_runs_that_follow_neither_law_or_do_not_compare_are_refused_in_one_line(
    sizes, tmp_path, monkeypatch, capsys
):
    other = write_end(tmp_path / "other", grown=True, flops=1e15, loss=3.0, data="others")
    longer = {"stages.1.tokens": 10**10}
    unfinished = write_end(tmp_path / "short", grown=True, flops=1e15, loss=3.0, **longer)
    cases = [
        (sizes[:4], "scratch is of 2, stack(2) is of 2"),
        (
            sizes[1::2],
            "of sizes, stack(2) is of 4; a law of loss over compute needs",
        ),
        ([*sizes, sizes[0]], "is the same run as another"),
        ([*sizes, unfinished], "has not come to the end of its last stage"),
        ([*sizes, other], "data is others in "),
    ]
    for paths, message in cases:
        monkeypatch.setattr("sys.argv", ["scale", *map(str, paths)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
