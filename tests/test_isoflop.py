"""IsoFLOP analysis: best timings, best factors, timing laws and reports."""

import dataclasses
import itertools
import json
import math

import pytest
from conftest import tiny_model, tiny_run
from recorded import record_run, row, seam

from stackjax.analysis.isoflop import find_optima
from stackjax.analysis.isoflop_report import write
from stackjax.analysis.reading import read_record
from stackjax.analysis.timing import TimingLaw
from stackjax.config import Stage
from stackjax.growth import Noise, Stack, chain
from stackjax.isoflop import main
from stackjax.model.flops import num_params
from stackjax.options import IsoflopConfig

PLANTED = TimingLaw(params=0.6, flops=40.0, constant=2.5)
BEST_FACTOR = 3.0
BUDGET = 1e16
DIMS = (16, 32, 64)
TIMINGS = (10**7.5, 10**8, 10**8.5, 10**9)
FACTORS = (2, 3, 6)


def model_of(dim):
    return tiny_model(num_layers=6, embed_dim=dim)


def loss_of(model, d, factor, flops):
    """Returns a power law in compute plus parabolas around the best timing and factor."""
    late = math.log10(d / PLANTED(num_params(model), flops))
    large = math.log10(factor / BEST_FACTOR)
    return 3 * (flops / 1e15) ** -0.3 + 0.02 * late**2 + 0.03 * large**2


def write_cell(path, dim, d, factor, seed=0, growth=None, **fields):
    """Writes a run with a growth timing and factor; factor 1 is scratch."""
    model = model_of(dim)
    stages = (Stage(tokens=max(640, int(d)), batch_size=8),)
    rows = [row("train", 0, 1e12, 5.0)]
    if factor > 1:
        stages += (Stage(tokens=1280, batch_size=8, growth=growth or Stack(factor)),)
        rows.append(seam(1, 1e13, int(d)))
    last = len(stages) - 1
    for share in (0.25, 0.5, 0.75, 1.0):
        flops = share * BUDGET
        loss = 2.9 if factor == 1 else loss_of(model, int(d), factor, flops)
        # Tokens include the small model's tokens; losses do not depend on tokens.
        rows.append(row("evaluation", last, flops, loss + 0.1 * (1 - share), int(d + flops)))
    config = dataclasses.replace(tiny_run(path, model=model), stages=stages, seed=seed)
    return record_run(path, config, rows, **fields)


def optima(paths, *budgets):
    return find_optima([read_record(path) for path in paths], "held_out", budgets)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Runs with three sizes: scratch, four timings at factor 3, three factors at 1e8 tokens."""
    path = tmp_path_factory.mktemp("cells")
    found = []
    for dim in DIMS:
        found.append(write_cell(path / f"{dim}-scratch", dim, 0, 1))
        grid = {(d, 3) for d in TIMINGS} | {(TIMINGS[1], factor) for factor in FACTORS}
        for d, factor in sorted(grid):
            found.append(write_cell(path / f"{dim}-{d:.0f}-{factor}", dim, d, factor))
    return found


def test_planted_best_timing_is_recovered_for_every_size_and_budget(cells):
    found = optima(cells)
    factor_three = [each for each in found.timings if each.fixed == "stack(3)"]
    assert len(factor_three) == len(DIMS) * 2
    for each in factor_three:
        planted = math.log10(PLANTED(each.size.params, each.flops))
        # Timings are rounded to whole tokens.
        assert each.parabola.optimum == pytest.approx(planted, abs=1e-6)
        assert each.parabola.is_extrapolated == (not 7.5 <= planted <= 9)


def test_three_points_are_too_few_for_a_best_factor(cells):
    found = optima(cells, BUDGET)
    assert [each.fixed for each in found.factors] == ["stack(g) at 100,000,000 tokens"] * len(
        DIMS
    )
    # A parabola with an interval needs four points.
    assert all(each.why_none == "too few runs for a parabola" for each in found.factors)


def test_two_seeds_and_three_factors_give_the_best_factor(tmp_path):
    paths = [write_cell(tmp_path / f"scratch-{seed}", 16, 0, 1, seed) for seed in (0, 1)]
    for factor, seed in itertools.product(FACTORS, (0, 1)):
        paths.append(write_cell(tmp_path / f"{factor}-{seed}", 16, 1e8, factor, seed))
    [best] = optima(paths, BUDGET).factors
    assert 10**best.parabola.optimum == pytest.approx(BEST_FACTOR, rel=1e-6)
    assert [len(losses) for _, losses in best.points] == [2, 2, 2]


def test_planted_timing_law_is_recovered(cells):
    found = optima(cells, BUDGET / 4, BUDGET)
    law = found.laws["stack(3)"].law
    for name, value in dataclasses.asdict(PLANTED).items():
        assert getattr(law, name) == pytest.approx(value, rel=1e-4), name


def test_report_has_table_json_page_and_figures(cells, tmp_path):
    printed = write(IsoflopConfig(runs=tuple(cells), output=tmp_path / "out"))
    assert "log10 d = 0.88 log10 N + 163.27 / log10 C -5.74" in printed
    sizes = [num_params(model_of(dim)) for dim in DIMS]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"loss_over_{x}-{n}.png" for x in "dg" for n in sizes}
    assert names == pictures | {"isoflop.md", "isoflop.json", "index.html"}
    found = json.loads((tmp_path / "out" / "isoflop.json").read_text())
    assert found["timing_laws"]["stack(3)"]["params"]["value"] == pytest.approx(0.6, rel=1e-4)
    assert len(found["timings"]) == 2 * len(DIMS)


def test_missing_best_timing_has_a_reason_and_gives_no_law(tmp_path):
    paths = [write_cell(tmp_path / "scratch", 16, 0, 1)]
    paths += [write_cell(tmp_path / f"{d:.0f}", 16, d, 3) for d in TIMINGS[:2]]
    found = optima(paths)
    assert all(each.parabola is None for each in found.timings)
    assert found.laws["stack(3)"].startswith("0 best timings")
    printed = write(IsoflopConfig(runs=tuple(paths), output=tmp_path / "out"))
    assert "too few runs for a parabola; best tested " in printed


def test_different_growths_stay_separate_and_ambiguous_cells_are_refused(tmp_path):
    paths = [write_cell(tmp_path / "scratch", 16, 0, 1)]
    noisy = chain(Stack(3), Noise(0.2))
    for factor, growth in ((2, None), (3, None), (3, noisy)):
        path = tmp_path / f"{factor}-{growth is None}"
        paths.append(write_cell(path, 16, 1e8, factor, growth=growth))
    found = optima(paths, BUDGET)
    assert [(each.fixed, len(each.points)) for each in found.factors] == [
        ("stack(g) at 100,000,000 tokens", 2)
    ]
    # Of cells that differ only in learning rate, the best one counts.
    rate = {"optimizer.peak_learning_rate": 0.5}
    paths.append(write_cell(tmp_path / "rate", 16, 1e8, 3, **rate))
    assert [len(each.points) for each in optima(paths, BUDGET).factors] == [2]
    again = {"optimizer.b2": 0.5}
    paths.append(write_cell(tmp_path / "again", 16, 1e8, 3, **again))
    with pytest.raises(ValueError, match="other settings; leave one out"):
        optima(paths, BUDGET)


def test_unequal_cells_are_reported_with_the_field(tmp_path):
    paths = [write_cell(tmp_path / "scratch", 16, 0, 1)]
    for d in TIMINGS:
        other = {"optimizer.b2": 0.9} if d == TIMINGS[0] else {}
        paths.append(write_cell(tmp_path / f"{d:.0f}", 16, d, 3, **other))
    printed = write(IsoflopConfig(runs=tuple(paths), output=tmp_path / "out"))
    assert "optimizer.b2 is 0.95 in scratch and 3 more; 0.9 in stack(3) at" in printed
    found = json.loads((tmp_path / "out" / "isoflop.json").read_text())
    assert any("optimizer.b2" in note for note in found["notes"])
    assert str(paths[1]) in found["provenance"]["runs"]


def test_infinite_interval_is_written_as_null(tmp_path):
    # Losses are nearly flat, so the minimum is unknown.
    paths = [write_cell(tmp_path / "scratch", 16, 0, 1)]
    for d, bump in zip(TIMINGS, (1e-3, -1e-3, 1e-3, -0.999e-3), strict=True):
        path = write_cell(tmp_path / f"{d:.0f}", 16, d, 3)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for each in rows:
            if each["kind"] == "evaluation":
                each["held_out_loss"] = 3 - each["flops_6nd"] / BUDGET + bump
        (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        paths.append(path)
    out = tmp_path / "out"
    write(IsoflopConfig(runs=tuple(paths), budgets=(BUDGET,), output=out))
    [timing] = json.loads((out / "isoflop.json").read_text())["timings"]
    assert None in timing["interval"]
    assert "inf" in (out / "isoflop.md").read_text()


def test_runs_of_a_size_may_differ_in_execution_fields(tmp_path):
    paths = [write_cell(tmp_path / "scratch", 16, 0, 1, **{"model.remat": "full"})]
    paths += [write_cell(tmp_path / f"{d:.0f}", 16, d, 3) for d in TIMINGS]
    assert len(optima(paths).sizes) == 1


def test_runs_without_growth_are_refused_in_one_line(tmp_path, run_main):
    code, _, error = run_main(main, write_cell(tmp_path / "scratch", 16, 0, 1))
    assert (code, error.count("\n")) == (2, 1)
    assert "none of the 1 runs grows" in error
