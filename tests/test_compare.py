"""Comparisons of runs whose speed-up is known return it, and refuse what does not compare."""

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import tiny_model, tiny_run
from recorded import record_run, row, seam

from stackjax.analysis.comparison import compare, group
from stackjax.analysis.curve import Curve
from stackjax.analysis.layer_figure import caption, layer_figure
from stackjax.analysis.record import COSTS, read_record
from stackjax.analysis.speedup import at_budget, crossing, speedup_at_loss
from stackjax.compare import CompareConfig, main, write
from stackjax.config import Stage
from stackjax.growth import Stack

# A loss of 3 at 1e15 FLOPs, falling to two thirds of it for each factor of 100.
POWER = math.log(2 / 3) / math.log(100)
FLOPS = 1e15


def losses(flops, speedup=0.0):
    """The power law, of a run that needs fewer FLOPs by a speed-up."""
    return 3 * (np.asarray(flops) * (1 + speedup) / FLOPS) ** POWER


def curve(speedup=0.0, *, noise=0.0, points=40, last=1e17, drop=0.0, rng=None):
    """A run's curve, with noise in its losses and points missing at random."""
    costs = np.geomspace(FLOPS, last, points)
    values = losses(costs, speedup)
    if rng is not None:
        values = values * np.exp(noise * rng.normal(size=points))
        kept = rng.random(points) >= drop
        costs, values = costs[kept], values[kept]
    return Curve({"flops": costs}, values).over("flops")


@pytest.mark.parametrize("speedup", [-0.4, -0.05, 0.0, 0.3, 0.546, 2.0])
def test_the_speed_up_of_exact_curves_is_the_one_they_were_made_with(speedup):
    for loss in (2.6, 2.4, 2.2):
        found = speedup_at_loss([curve()], [curve(speedup)], loss)
        assert found.is_bound == ""
        assert found.estimate.value == pytest.approx(speedup, abs=1e-9)


def test_with_noise_and_missing_points_intervals_over_seeds_cover_the_truth():
    rng = np.random.default_rng(0)
    noisy = {"noise": 0.005, "drop": 0.3, "rng": rng}
    covered, values = 0, []
    for _ in range(200):
        sides = [[curve(speedup, **noisy) for _ in range(3)] for speedup in (0, 0.5)]
        estimate = speedup_at_loss(*sides, 2.4).estimate
        covered += estimate.low <= 0.5 <= estimate.high
        values.append(estimate.value)
    # Welch's interval is wide for three seeds; 0.9 and 0.99 are six deviations apart.
    assert 0.9 <= covered / 200 <= 0.99
    # A loss 0.5 % off is 5.7 % of the FLOPs off: 7 % of 1.5 for two means of three such
    # points, of which smoothing leaves less.
    assert np.median(values) == pytest.approx(0.5, abs=0.01)
    assert np.std(values) < 0.07


def test_more_noise_makes_wider_intervals():
    def width(noise):
        rng = np.random.default_rng(1)
        found = []
        for _ in range(40):
            sides = [[curve(s, noise=noise, rng=rng) for _ in range(3)] for s in (0, 0.5)]
            estimate = speedup_at_loss(*sides, 2.4).estimate
            found.append(estimate.high - estimate.low)
        return np.median(found)

    assert 2 < width(0.02) / width(0.002) < 20


def test_a_loss_that_a_side_has_not_reached_gives_a_bound():
    short = curve(last=1e16)
    found = speedup_at_loss([short], [curve(0.5)], losses(1.2e16))
    assert found.is_bound == ">"
    assert found.estimate.value > 0
    # The truth, 0.5, is more than what is known.
    assert found.estimate.value < 0.5
    mirrored = speedup_at_loss([curve()], [curve(0.5, last=1e16)], losses(2e16))
    assert mirrored.is_bound == "<"
    assert mirrored.estimate.value > 0.5 - 1e-9
    neither = speedup_at_loss([short], [short], 1.0)
    assert (neither.is_bound, neither.estimate) == ("-", None)
    before = speedup_at_loss([short], [short], 4.0)
    assert (before.is_bound, before.estimate) == ("-", None)


def test_curves_cross_where_they_were_made_to_and_those_that_do_not_say_so():
    always, never = curve(0.2), curve(-0.2)
    assert crossing([curve()], [always]) == pytest.approx(FLOPS)
    assert crossing([curve()], [never]) is None
    costs = np.geomspace(FLOPS, 1e17, 60)
    # Steeper, and equal at 1e16.
    steeper = losses(1e16) * (costs / 1e16) ** (1.5 * POWER)
    found = crossing([curve()], [Curve({"flops": costs}, steeper).over("flops")])
    assert found == pytest.approx(1e16, rel=0.01)


def test_runs_that_were_not_measured_at_the_same_cost_do_not_cross():
    early = curve(last=2e15)
    late = Curve({"flops": np.array([1e16, 1e17])}, np.array([2.0, 1.9])).over("flops")
    assert crossing([early], [late]) is None


def test_at_a_budget_stand_both_losses_their_gap_and_the_speed_up():
    found = at_budget([curve()], [curve(0.5)], 1e16)
    assert found.scratch == pytest.approx(losses(1e16), rel=1e-4)
    assert found.grown == pytest.approx(losses(1e16, 0.5), rel=1e-4)
    assert found.gap.value == pytest.approx(found.grown - found.scratch)
    assert found.speedup.estimate.value == pytest.approx(0.5, abs=1e-3)
    beyond = at_budget([curve()], [curve(0.5)], 1e18)
    assert (beyond.scratch, beyond.grown, beyond.gap, beyond.speedup) == (None,) * 4


def test_a_curve_never_rises_and_keeps_the_mean_of_what_it_smooths():
    rng = np.random.default_rng(2)
    costs = np.geomspace(1, 100, 50)
    measured = losses(FLOPS * costs) * np.exp(0.1 * rng.normal(size=50))
    smooth = Curve({"flops": costs}, measured).over("flops")
    assert (np.diff(smooth.log_losses) < 0).all()
    assert len(smooth.log_losses) < 50


# What writes the directory of a run.


def write_run(
    path,
    *,
    seed=0,
    grown=True,
    speedup=0.0,
    noise=0.0,
    layers=(),
    **fields,
):
    """A run directory whose last model's losses follow the power law.

    Args:
      layers: Rows of its layers, besides.
    """
    stages = (Stage(tokens=640, batch_size=8),)
    if grown:
        stages += (Stage(tokens=1280, batch_size=8, growth=Stack(2)),)
    config = dataclasses.replace(
        tiny_run(path, model=tiny_model(num_layers=6)), stages=stages, seed=seed
    )
    rng = np.random.default_rng(seed)
    rows = [row("train", 0, 1e14, 5.0)]
    if grown:
        rows.append(seam(1, 5e14))
    for flops in np.geomspace(FLOPS, 1e17, 40):
        loss = float(losses(flops, speedup) * np.exp(noise * rng.normal()))
        stage = 1 if grown else 0
        rows += [row(kind, stage, flops, loss) for kind in ("train", "evaluation")]
    return record_run(path, config, [*rows, *layers], **fields)


def layer_rows(*, similar=True, last=1e17):
    """Rows of layers at the seam, where six new layers add nothing, and later."""
    before = {"contribution_before": [0.5] * 6, "norm_before": [0.1] * 6}
    seam = {"contribution": [0.5] * 6 + [0.0] * 6, "norm": [0.1] * 12}
    later = {"contribution": [0.25] * 12, "norm": [0.2] * 12}
    if similar:
        seam["similarity"], later["similarity"] = [1.0] * 12, [None, *[0.5] * 11]
    found = [row("layers", 1, 5e14, None) | seam | before]
    return found if last is None else [*found, row("layers", 1, last, None) | later]


def older(path):
    """A run that did not record its tokenizer."""
    record = write_run(path) / "config.json"
    fields = json.loads(record.read_text())
    del fields["tokenizer"]
    record.write_text(json.dumps(fields))
    return path


@pytest.fixture
def runs(tmp_path):
    """Three seeds of scratch, and of a growth that spends a third less."""
    return [
        write_run(tmp_path / f"{name}-{seed}", seed=seed, grown=grown, speedup=s, noise=0.003)
        for name, grown, s in (("scratch", False, 0.0), ("grown", True, 0.5))
        for seed in range(3)
    ]


@pytest.mark.parametrize("loss", ["held_out", "train"])
def test_a_comparison_of_run_directories_finds_their_speed_up_by_every_cost(runs, loss):
    groups = group([read_record(path) for path in reversed(runs)])
    assert [each.label for each in groups] == ["scratch", "stack(2) at 500M tokens"]
    [found] = compare(groups, loss, losses=(2.5,), budgets=(1e16,))
    for cost in COSTS:
        estimate = found.at_losses[2.5][cost].estimate
        assert estimate.low < 0.5 < estimate.high
        assert estimate.value == pytest.approx(0.5, abs=0.1)
    assert found.at_budgets["flops_6nd"][0].scratch == pytest.approx(losses(1e16), rel=0.01)


def test_losses_are_looked_at_that_every_seed_of_scratch_has_come_down_to(runs):
    scratch, *_ = groups = group([read_record(path) for path in runs])
    [found] = compare(groups, "held_out")
    last = [record.curve("held_out").over("flops_6nd").last_loss for record in scratch.records]
    assert max(last) in found.at_losses
    assert found.at_losses[max(last)]["flops_6nd"].is_bound == ""
    # A mean of them would be out of reach for one.
    assert np.mean(last) < max(last)


def test_device_seconds_are_those_of_all_devices_while_they_trained(runs):
    record = read_record(runs[0])
    curve = record.curve("held_out")
    np.testing.assert_allclose(
        curve.costs["device_seconds"], 2 * curve.costs["tokens"] / 1000, rtol=1e-6
    )


def test_it_writes_a_table_numbers_pictures_and_a_page_that_needs_nothing_else(runs, tmp_path):
    out = tmp_path / "out"
    printed = write(CompareConfig(runs=tuple(runs), output=out))
    assert "% fewer FLOPs (6ND) than scratch" in printed
    assert {path.name for path in out.iterdir()} == {
        "comparison.md",
        "comparison.json",
        "index.html",
        "loss_over_flops_6nd.png",
        "loss_over_tokens.png",
        "loss_over_device_seconds.png",
    }
    found = json.loads((out / "comparison.json").read_text())
    assert len(found["runs"]) == 6
    levels = found["comparisons"][0]["at_losses"]
    assert levels[0]["tokens"]["estimate"]["value"] == pytest.approx(0.5, abs=0.1)
    html = (out / "index.html").read_text()
    assert html.count("<svg") == 3
    assert "<script" not in html
    # Namespaces name addresses, and nothing is fetched from them.
    assert "src=" not in html
    assert "@import" not in html
    assert "currentColor" in html
    assert "layers" not in html


def test_where_layers_were_measured_it_shows_what_growth_does_to_them(tmp_path):
    paths = [write_run(tmp_path / "scratch", grown=False)]
    paths += [
        write_run(tmp_path / f"grown-{seed}", seed=seed, layers=layer_rows()) for seed in (3, 4)
    ]
    write(CompareConfig(runs=tuple(paths), output=tmp_path / "out"))
    assert (tmp_path / "out" / "layers-1.png").exists()
    html = (tmp_path / "out" / "index.html").read_text()
    # Of the first seed alone.
    assert html.count("<svg") == 4
    assert html.count("<figcaption>") == 1
    assert "seed 3: the weights of a layer and of its copies" in html
    assert "of 1.000 just after growth and of 0.500 at the end" in html


def test_a_picture_of_layers_has_a_panel_for_each_thing_that_was_measured(tmp_path):
    def drawn(name, rows):
        record = read_record(write_run(tmp_path / name, layers=rows))
        return record, layer_figure(record)

    _, whole = drawn("whole", layer_rows())
    similarity, contribution, norm = whole.axes
    assert [len(plot.lines) for plot in (similarity, contribution, norm)] == [12, 3, 3]
    ends = [line.get_ydata()[-1] for line in similarity.lines]
    assert np.isnan(ends[0])
    assert ends[1:] == [0.5] * 11
    # Tokens count from the growth, which was at 5e8 of them.
    assert list(similarity.lines[0].get_xdata()) == [0, 1e11 - 5e8]
    record, no_copies = drawn("no copies", layer_rows(similar=False))
    assert len(no_copies.axes) == 2
    assert caption(record, "wide").endswith("before and after growth, and at the end.")
    _, at_the_seam = drawn("at the seam", layer_rows(last=None))
    assert [len(plot.lines) for plot in at_the_seam.axes] == [12, 2, 2]
    # Measured from after the growth on, and not at all.
    for name, rows in (("late", layer_rows()[1:]), ("never", [])):
        assert drawn(name, rows)[1] is None


def test_a_grown_run_that_loses_is_said_to(tmp_path):
    paths = [
        write_run(tmp_path / "scratch", grown=False),
        write_run(tmp_path / "grown", speedup=-0.2),
    ]
    printed = write(CompareConfig(runs=tuple(paths), output=tmp_path / "out"))
    assert "it has spent 25.0 % more FLOPs (6ND) than scratch" in printed
    assert "a speed-up of -20.0 %" in printed
    assert "not at all" in printed


REFUSED = {
    "data": ({"data": "others"}, "data is others in "),
    "tokenizer": ({"tokenizer": "pieces"}, "tokenizer is pieces in "),
    "final model": ({"model.embed_dim": 32}, "the last model's embed_dim is 32 in "),
    "evaluation": ({"evaluation.num_sequences": 9}, "evaluation.num_sequences is 9 in "),
    "length": ({"data.seq_len": 16}, "data.seq_len is 16 in "),
    "documents": ({"data.mask_documents": True}, "data.mask_documents is True in "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_whose_losses_mean_something_else_are_refused_with_the_field(tmp_path, name):
    fields, message = REFUSED[name]
    paths = [
        write_run(tmp_path / "scratch", grown=False),
        write_run(tmp_path / "grown", **fields),
    ]
    with pytest.raises(ValueError, match=message):
        group([read_record(path) for path in paths])


def test_how_a_model_is_executed_does_not_matter(tmp_path):
    paths = [
        write_run(tmp_path / "scratch", grown=False),
        write_run(tmp_path / "grown", **{"model.remat": "full", "model.scan_unroll": 0}),
    ]
    assert len(group([read_record(path) for path in paths])) == 2


def test_runs_that_lack_a_side_or_stand_twice_are_refused_in_one_line(
    tmp_path, monkeypatch, capsys
):
    scratch = write_run(tmp_path / "scratch", grown=False)
    again = write_run(tmp_path / "again", grown=False)
    grown = write_run(tmp_path / "grown")
    cases = [
        ([grown], "0 of the 1 trainings are from scratch"),
        ([scratch], "1 of the 1 trainings are from scratch"),
        ([scratch, again, grown], "the same training from the same seed"),
        ([scratch, tmp_path], "has no config.json"),
        ([scratch, older(tmp_path / "older")], "is damaged: tokenizer is missing"),
    ]
    for paths, message in cases:
        monkeypatch.setattr("sys.argv", ["compare", *map(str, paths)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
