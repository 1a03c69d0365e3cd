"""Run comparisons: speed-ups, intervals, reports and incomparable runs."""

import dataclasses
import itertools
import json
import math
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model, tiny_run
from etils import epath
from matplotlib.figure import Figure
from recorded import record_run, row, seam

from stackjax.analysis.comparison import compare, group
from stackjax.analysis.comparison_report import write
from stackjax.analysis.layer_figure import caption, layer_figure
from stackjax.analysis.loss_curve import Curve
from stackjax.analysis.names import COSTS
from stackjax.analysis.plots import sign
from stackjax.analysis.reading import read_record
from stackjax.analysis.settings import settings, trace
from stackjax.analysis.speedup import at_budget, crossing, speedup_at_loss
from stackjax.checkpoint.contents import Contents
from stackjax.checkpoint.lineage import Generation
from stackjax.checkpoint.save import write_first
from stackjax.compare import main
from stackjax.config import Stage
from stackjax.config_record import RECORD, config_record, read_config_record
from stackjax.growth import Stack
from stackjax.options import CompareConfig
from stackjax.run.train import train
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Counts
from stackjax.training.train_state import TrainState

# The loss is 3 at 1e15 FLOPs; 100 times the FLOPs reduce the loss to two thirds.
POWER = math.log(2 / 3) / math.log(100)
FLOPS = 1e15


def losses(flops, speedup=0.0):
    """Returns power-law losses of a run with a speed-up."""
    return 3 * (np.asarray(flops) * (1 + speedup) / FLOPS) ** POWER


def curve(speedup=0.0, *, noise=0.0, points=40, last=1e17, drop=0.0, rng=None):
    """Returns a loss curve with noise and randomly missing points."""
    costs = np.geomspace(FLOPS, last, points)
    values = losses(costs, speedup)
    if rng is not None:
        values = values * np.exp(noise * rng.normal(size=points))
        kept = rng.random(points) >= drop
        costs, values = costs[kept], values[kept]
    return Curve({"flops": costs}, values).over("flops")


@pytest.mark.parametrize("speedup", [-0.4, -0.05, 0.0, 0.3, 0.546, 2.0])
def test_exact_curves_give_their_speedup(speedup):
    for loss in (2.6, 2.4, 2.2):
        found = speedup_at_loss([curve()], [curve(speedup)], loss)
        assert found.is_bound == ""
        assert found.estimate.value == pytest.approx(speedup, abs=1e-9)


def test_intervals_cover_the_truth_despite_noise_and_missing_points():
    rng = np.random.default_rng(0)
    noisy = {"noise": 0.005, "drop": 0.3, "rng": rng}
    covered, values = 0, []
    for _ in range(200):
        sides = [[curve(speedup, **noisy) for _ in range(3)] for speedup in (0, 0.5)]
        estimate = speedup_at_loss(*sides, 2.4).estimate
        covered += estimate.low <= 0.5 <= estimate.high
        values.append(estimate.value)
    # Welch's intervals are wide for three seeds. The bounds are six standard errors apart.
    assert 0.9 <= covered / 200 <= 0.99
    # A loss error of 0.5 % is a FLOPs error of 5.7 %. With three seeds per side, the speed-up
    # has an error of 0.07, reduced by smoothing.
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


def test_loss_reached_by_one_side_gives_a_bound():
    short = curve(last=1e16)
    found = speedup_at_loss([short], [curve(0.5)], losses(1.2e16))
    assert found.is_bound == ">"
    assert found.estimate.value > 0
    # The bound is below the true speed-up, 0.5.
    assert found.estimate.value < 0.5
    mirrored = speedup_at_loss([curve()], [curve(0.5, last=1e16)], losses(2e16))
    assert mirrored.is_bound == "<"
    assert mirrored.estimate.value > 0.5 - 1e-9
    neither = speedup_at_loss([short], [short], 1.0)
    assert (neither.is_bound, neither.estimate) == ("-", None)
    before = speedup_at_loss([short], [short], 4.0)
    assert (before.is_bound, before.estimate) == ("-", None)


def test_crossing_is_the_cost_of_equal_losses():
    always, never = curve(0.2), curve(-0.2)
    assert crossing([curve()], [always]) == pytest.approx(FLOPS)
    assert crossing([curve()], [never]) is None
    costs = np.geomspace(FLOPS, 1e17, 60)
    # A steeper curve with equal loss at 1e16 FLOPs.
    steeper = losses(1e16) * (costs / 1e16) ** (1.5 * POWER)
    found = crossing([curve()], [Curve({"flops": costs}, steeper).over("flops")])
    assert found == pytest.approx(1e16, rel=0.01)


def test_runs_without_common_cost_do_not_cross():
    early = curve(last=2e15)
    late = Curve({"flops": np.array([1e16, 1e17])}, np.array([2.0, 1.9])).over("flops")
    assert crossing([early], [late]) is None


def test_losses_gap_and_speedup_are_interpolated_at_a_budget():
    found = at_budget([curve()], [curve(0.5)], 1e16)
    assert found.scratch == pytest.approx(losses(1e16), rel=1e-4)
    assert found.grown == pytest.approx(losses(1e16, 0.5), rel=1e-4)
    assert found.gap.value == pytest.approx(found.grown - found.scratch)
    assert found.speedup.estimate.value == pytest.approx(0.5, abs=1e-3)
    beyond = at_budget([curve()], [curve(0.5)], 1e18)
    assert (beyond.scratch, beyond.grown, beyond.gap, beyond.speedup) == (None,) * 4


def test_smoothed_curve_never_rises():
    rng = np.random.default_rng(2)
    costs = np.geomspace(1, 100, 50)
    measured = losses(FLOPS * costs) * np.exp(0.1 * rng.normal(size=50))
    smooth = Curve({"flops": costs}, measured).over("flops")
    assert (np.diff(smooth.log_losses) < 0).all()
    assert len(smooth.log_losses) < 50


# Run directories.


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
    """Writes a run directory; the last model's losses follow the power law.

    Args:
      layers: Additional rows with layer statistics.
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
    rows = sorted([*rows, *layers], key=lambda row: row["tokens"])
    return record_run(path, config, rows, **fields)


def scratch_and_grown(path, **fields):
    """Writes a scratch run and a grown run; the grown run has these fields."""
    return [write_run(path / "scratch", grown=False), write_run(path / "grown", **fields)]


def report(path, runs):
    """Writes the report of a comparison; returns the printed text."""
    return write(CompareConfig(runs=tuple(runs), output=path / "out"))


def layer_rows(*, similar=True, last=1e17):
    """Returns layer statistics at growth, with six new layers that add nothing, and later."""
    before = {"contribution_before": [0.5] * 6, "norm_before": [0.1] * 6}
    seam = {"contribution": [0.5] * 6 + [0.0] * 6, "norm": [0.1] * 12}
    later = {"contribution": [0.25] * 12, "norm": [0.2] * 12}
    if similar:
        seam["similarity"], later["similarity"] = [1.0] * 12, [None, *[0.5] * 11]
    found = [row("layers", 1, 5e14, None) | seam | before]
    return found if last is None else [*found, row("layers", 1, last, None) | later]


def run_without_tokenizer(path):
    """Writes a run without a recorded tokenizer."""
    record = write_run(path) / "config.json"
    fields = json.loads(record.read_text())
    del fields["tokenizer"]
    record.write_text(json.dumps(fields))
    return path


@pytest.fixture
def runs(tmp_path):
    """Scratch runs and grown runs with a speed-up of 0.5, three seeds each."""
    return [
        write_run(tmp_path / f"{name}-{seed}", seed=seed, grown=grown, speedup=s, noise=0.003)
        for name, grown, s in (("scratch", False, 0.0), ("grown", True, 0.5))
        for seed in range(3)
    ]


@pytest.mark.parametrize("loss", ["held_out", "train"])
def test_run_directories_give_their_speedup_in_every_cost(runs, loss):
    groups = group([read_record(path) for path in reversed(runs)])
    assert [each.label for each in groups] == ["scratch", "stack(2) at 500M tokens"]
    [found] = compare(groups, loss, losses=(2.5,), budgets=(1e16,))
    for cost in COSTS:
        estimate = found.at_losses[2.5][cost].estimate
        assert estimate.low < 0.5 < estimate.high
        assert estimate.value == pytest.approx(0.5, abs=0.1)
    assert found.at_budgets["flops_6nd"][0].scratch == pytest.approx(losses(1e16), rel=0.01)


def test_default_losses_are_reached_by_every_scratch_seed(runs):
    scratch, *_ = groups = group([read_record(path) for path in runs])
    [found] = compare(groups, "held_out")
    last = [record.curve("held_out").over("flops_6nd").last_loss for record in scratch.records]
    assert max(last) in found.at_losses
    assert found.at_losses[max(last)]["flops_6nd"].is_bound == ""
    # The worst seed does not reach the mean.
    assert np.mean(last) < max(last)


def test_device_seconds_count_all_devices_while_training(runs):
    record = read_record(runs[0])
    curve = record.curve("held_out")
    np.testing.assert_allclose(
        curve.costs["device_seconds"], 2 * curve.costs["tokens"] / 1000, rtol=1e-6
    )


def test_report_has_table_json_figures_and_self_contained_page(runs, tmp_path):
    printed, out = report(tmp_path, runs), tmp_path / "out"
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
    # Addresses occur only as XML namespaces; the page loads nothing.
    assert "src=" not in html
    assert "@import" not in html
    assert "currentColor" in html
    assert "What growth does to layers" not in html


def test_output_is_checked_before_runs_are_read(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"--output is {file}/out, but {file} is a file"):
        write(CompareConfig(runs=(tmp_path / "missing",), output=file / "out"))


def test_report_shows_layer_statistics_if_measured(tmp_path):
    paths = [write_run(tmp_path / "scratch", grown=False)]
    paths += [
        write_run(tmp_path / f"grown-{seed}", seed=seed, layers=layer_rows()) for seed in (3, 4)
    ]
    report(tmp_path, paths)
    assert (tmp_path / "out" / "layers-1.png").exists()
    html = (tmp_path / "out" / "index.html").read_text()
    # Only the first seed has a layer figure.
    assert html.count("<svg") == 4
    assert html.count("<figcaption>") == 1
    assert "seed 3: the mean cosine similarity" in html
    assert "1.000 just after growth and 0.500 at the end" in html


def test_layer_figure_has_a_panel_per_statistic(tmp_path):
    def drawn(name, rows):
        record = read_record(write_run(tmp_path / name, layers=rows))
        return record, layer_figure(record)

    _, whole = drawn("whole", layer_rows())
    similarity, contribution, norm = whole.axes
    assert [len(plot.lines) for plot in (similarity, contribution, norm)] == [12, 3, 3]
    ends = [line.get_ydata()[-1] for line in similarity.lines]
    assert np.isnan(ends[0])
    assert ends[1:] == [0.5] * 11
    # The x axis has the tokens since growth, at 5e8 tokens.
    assert list(similarity.lines[0].get_xdata()) == [0, 1e11 - 5e8]
    record, no_copies = drawn("no copies", layer_rows(similar=False))
    assert len(no_copies.axes) == 2
    assert "similarity" not in caption(record, "wide")
    _, at_the_seam = drawn("at the seam", layer_rows(last=None))
    assert [len(plot.lines) for plot in at_the_seam.axes] == [12, 2, 2]
    # Statistics begin after growth, or are missing.
    for name, rows in (("late", layer_rows()[1:]), ("never", [])):
        assert drawn(name, rows)[1] is None


@pytest.mark.usefixtures("undrawn")
def test_negative_speedup_is_reported(tmp_path):
    printed = report(tmp_path, scratch_and_grown(tmp_path, speedup=-0.2))
    assert "25.0 % more FLOPs (6ND) than scratch" in printed
    assert "a speed-up of -20.0 %" in printed
    assert "never" in printed


REFUSED = {
    "data": ({"data": "others"}, "data is others in "),
    "tokenizer": ({"tokenizer": "pieces"}, "tokenizer is pieces in "),
    "final model": ({"model.embed_dim": 32}, "embed_dim is 32 in "),
    "evaluation": ({"evaluation.num_sequences": 9}, "evaluation.num_sequences is 9 in "),
    "length": ({"data.seq_len": 16}, "data.seq_len is 16 in "),
    "documents": ({"data.mask_documents": True}, "data.mask_documents is True in "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_incomparable_runs_are_refused_with_the_field(tmp_path, name):
    fields, message = REFUSED[name]
    paths = scratch_and_grown(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        group([read_record(path) for path in paths])


def test_runs_may_differ_in_execution_fields(tmp_path):
    paths = scratch_and_grown(tmp_path, **{"model.remat": "full", "model.scan_unroll": 0})
    assert len(group([read_record(path) for path in paths])) == 2


def test_missing_side_or_duplicate_run_is_refused_in_one_line(tmp_path, run_main):
    scratch = write_run(tmp_path / "scratch", grown=False)
    again = write_run(tmp_path / "again", grown=False)
    grown = write_run(tmp_path / "grown")
    cases = [
        ([grown], "0 of 1 trainings"),
        ([scratch], "1 of 1 trainings"),
        ([scratch, again, grown], "equal seeds"),
        ([scratch, tmp_path], "has no config.json"),
        (
            [scratch, run_without_tokenizer(tmp_path / "no tokenizer")],
            "is damaged: tokenizer is missing",
        ),
    ]
    for paths, message in cases:
        code, _, error = run_main(main, *paths)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error


# Initial models.


def started_from(path, *, generations, speedup=0.0, seed=0, grown=False):
    """Writes a run with an initial model and a checkpoint with a lineage."""
    run = write_run(path, seed=seed, grown=grown, speedup=speedup, **{"init_from": "elsewhere"})
    small = tiny_model(num_layers=3)
    lineage = [
        Generation(stage=i, name="train", growth=growth, model=small, spent=spent, code="c")
        for i, (growth, spent) in enumerate([*generations, (None, Counts(tokens=1))])
    ]
    contents = Contents(Counts(), small, is_model=True, lineage=tuple(lineage))
    state = TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, None)
    write_first(epath.Path(run) / "stage_0" / "train", state, contents)
    return run


SMALL = Counts(tokens=500_000_000, examples=1, flops_6nd=5 * 10**14, flops=10**15)


def test_run_is_charged_for_its_initial_model(tmp_path):
    generations = [(None, SMALL), ("stack(2)", Counts())]
    record = read_record(started_from(tmp_path / "grown", generations=generations))
    plain = read_record(write_run(tmp_path / "plain", grown=False))
    for cost, charge in (("flops_6nd", 5e14), ("flops", 1e15), ("tokens", 5e8)):
        ours, theirs = (each.curve("held_out").costs[cost] for each in (record, plain))
        np.testing.assert_allclose(ours, theirs + charge)
        assert record.all_losses("held_out", cost)[0][0] > charge
    # The lineage has no seconds.
    assert np.isnan(record.curve("held_out").costs["device_seconds"]).all()
    assert record.growth_tokens == [500_000_000]


def test_growth_before_the_run_is_charged_and_reported(tmp_path):
    scratch = write_run(tmp_path / "scratch", grown=False)
    grown = started_from(
        tmp_path / "grown", generations=[(None, SMALL), ("stack(2)", Counts())], speedup=0.5
    )
    printed = report(tmp_path, [scratch, grown])
    assert "stack(2) at 500M tokens, from elsewhere: " in printed
    assert "charged with 500M tokens and 5e+14 FLOPs (6ND)" in printed
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["runs"][1]["charged"]["flops_6nd"] == 5 * 10**14
    assert found["runs"][1]["device_seconds"] is None
    assert not (tmp_path / "out" / "loss_over_device_seconds.png").exists()
    # Without the charge, the speed-up would be 0.5.
    budget = found["comparisons"][0]["at_losses"][-1]["flops_6nd"]["estimate"]["value"]
    assert budget < 0.5


@pytest.mark.slow
def test_real_run_is_charged_for_the_previous_run(world, uncut, tmp_path):
    config = world.config(workdir=tmp_path / "next")
    stages = (dataclasses.replace(config.stages[0], growth=None),)
    train(dataclasses.replace(config, stages=stages, init_from=str(uncut)))
    before, after = read_record(uncut), read_record(tmp_path / "next")
    assert dataclasses.asdict(after.charge) == {
        name: before.rows[-1][name] for name in ("tokens", "examples", "flops_6nd", "flops")
    }
    assert after.growth_tokens == before.growth_tokens == [8 * 128]
    assert after.is_finished
    assert after.curve("train").costs["tokens"][0] > before.rows[-1]["tokens"]


@pytest.mark.parametrize("generations", [[], [(None, Counts())]])
def test_initial_model_with_unknown_cost_is_refused(tmp_path, generations):
    run = started_from(tmp_path / "run", generations=generations)
    with pytest.raises(UserError, match="init_from is elsewhere, a model with unknown"):
        read_record(run)
    shutil.rmtree(run / "stage_0")
    with pytest.raises(UserError, match="init_from is elsewhere, but"):
        read_record(run)


# Groups.


def test_group_members_differ_only_in_seed_and_execution(tmp_path):
    names = map(str, itertools.count())
    first = read_record(write_run(tmp_path / "first"))

    def is_same_training(**fields):
        other = read_record(write_run(tmp_path / next(names), seed=1, **fields))
        return first.training == other.training

    assert is_same_training()
    executed = {
        "model.remat": "full",
        "stages.1.accumulate": 2,
        "platform": "accelerator",
        "data.num_workers": 3,
        "mesh.fsdp": 8,
    }
    assert is_same_training(**executed)
    config = first.config
    for field in ("optimizer.b2", "stages.1.batch_size", "stages.0.tokens", "optimizer.z_loss"):
        assert not is_same_training(**{field: config[field] + 1}), field
    assert not is_same_training(data="others")
    assert not is_same_training(**{"optimizer.schedule.shape": "wsd"})


def test_checkpoint_interval_is_of_training_only_with_averaging(tmp_path):
    field, interval = "stages.1.average_checkpoints", "checkpoints.every_tokens"
    records = {
        (number, every): read_record(
            write_run(tmp_path / f"{number}-{every}", **{field: number, interval: every})
        )
        for number in (1, 2)
        for every in (64, 128)
    }
    trainings = {key: record.training for key, record in records.items()}
    assert trainings[1, 64] == trainings[1, 128]
    assert trainings[1, 64] != trainings[2, 64] != trainings[2, 128]
    # Older records do not have the field.
    older = {name: value for name, value in records[1, 64].config.items() if name != field}
    older = dataclasses.replace(records[1, 64], config=older)
    assert (older.training, settings(older)) == (trainings[1, 64], settings(records[1, 64]))


@pytest.mark.usefixtures("undrawn")
def test_unequal_settings_are_reported_with_values(tmp_path):
    paths = scratch_and_grown(tmp_path, **{"optimizer.b2": 0.999, "stages.1.batch_size": 4})
    printed = report(tmp_path, paths)
    assert "optimizer.b2 is 0.95 in scratch; 0.999 in stack(2) at 500M" in printed
    assert "last stage's batch_size is 8 in scratch; 4 in stack(2)" in printed
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert any("optimizer.b2 is 0.95" in note for note in found["notes"])


def tuned(path, rates, *, grown):
    """Writes a run for each peak learning rate, with a speed-up."""
    return [
        write_run(
            path / f"{'grown' if grown else 'scratch'}-{rate:g}",
            grown=grown,
            speedup=speedup,
            **{"optimizer.peak_learning_rate": rate},
        )
        for rate, speedup in rates.items()
    ]


def test_each_side_is_compared_at_its_best_rate(tmp_path):
    scratch = tuned(tmp_path, {1e-3: -0.1, 2e-3: 0.0, 4e-3: -0.2}, grown=False)
    grown = tuned(tmp_path, {1e-3: 0.1, 2e-3: 0.2, 4e-3: 0.5}, grown=True)
    groups = group([read_record(path) for path in grown + scratch])
    assert [each.records[0].path.name for each in groups] == ["scratch-0.002", "grown-0.004"]
    printed = report(tmp_path, scratch + grown)
    finals = [read_record(path).final_loss for path in scratch]
    tried = "; ".join(
        f"{rate}: {loss:.4f}, 1 seed"
        for rate, loss in zip((0.001, 0.002, 0.004), finals, strict=True)
    )
    assert f"scratch: the best of 3 peak learning rates ({tried})." in printed
    assert "scratch: 0.002 is at the end" not in printed
    assert "stack(2) at 500M tokens: 0.004 is at the end of the rates tried" in printed
    assert "Not tuned alike" not in printed


def test_rates_in_another_order_are_other_rates(tmp_path):
    paths = [write_run(tmp_path / "scratch", grown=False)]
    for place, rates in enumerate([(1e-3, 2e-3), (2e-3, 1e-3), (1e-3, 1e-3)]):
        own = {f"stages.{i}.peak_learning_rate": rate for i, rate in enumerate(rates)}
        paths.append(write_run(tmp_path / str(place), **own))
    printed = report(tmp_path, paths)
    for text in ("0.001: ", "0.001, then 0.002: ", "0.002, then 0.001: "):
        assert text in printed
    assert "the best of 3 peak learning rates" in printed


def test_older_record_without_newer_fields_is_of_the_same_training(tmp_path):
    paths = [write_run(tmp_path / str(seed), grown=False, seed=seed) for seed in range(2)]
    record = read_config_record(paths[0] / RECORD)
    for name in ("model.loops", "model.completep", "data.packing", "stages.0.seq_len"):
        del record["config"][name]
    del record["config"]["stages.0.average_checkpoints"]
    (paths[0] / RECORD).write_text(config_record(record))
    paths.append(write_run(tmp_path / "grown"))
    groups = group([read_record(path) for path in paths])
    assert [len(each.records) for each in groups] == [2, 1]


@pytest.mark.parametrize("num_scratch", [1, 2])
def test_unequal_tuning_is_reported(tmp_path, num_scratch):
    rates = {1e-3: 0.0, 2e-3: 0.1, 4e-3: 0.0}
    scratch = tuned(tmp_path, dict(list(rates.items())[:num_scratch]), grown=False)
    printed = report(tmp_path, scratch + tuned(tmp_path, rates, grown=True))
    said = f"peak learning rates tried are {num_scratch} for scratch, 3 for stack(2) at 500M"
    assert f"Not tuned alike: {said} tokens" in printed


# Headlines.


def slow_down(path, factor):
    """Divides a run's tokens/s by a factor."""
    file = path / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for each in found:
        if "tokens_per_second" in each:
            each["tokens_per_second"] /= factor
    file.write_text("".join(json.dumps(each) + "\n" for each in found))
    return path


@pytest.mark.usefixtures("undrawn")
def test_headline_names_costs_with_the_opposite_result(tmp_path):
    paths = [
        write_run(tmp_path / "scratch", grown=False),
        slow_down(write_run(tmp_path / "grown", speedup=0.5), 3),
    ]
    headline = report(tmp_path, paths).splitlines()[0]
    assert "a speed-up of +50.0 % (one seed of scratch and of grown; no interval)" in headline
    assert headline.endswith("loses in device-seconds (-50.0 %).")
    paths[1] = write_run(tmp_path / "other", speedup=-0.2)
    slow_down(paths[0], 3)
    headline = report(tmp_path, paths).splitlines()[0]
    assert "a speed-up of -20.0 %" in headline
    assert headline.endswith("wins in device-seconds (+140.0 %).")


@pytest.mark.usefixtures("undrawn")
def test_zero_speedup_and_interval_around_zero_are_reported(tmp_path):
    paths = [
        write_run(tmp_path / f"{grown}-{seed}", grown=grown, seed=seed, noise=0.003 * noisy)
        for grown in (False, True)
        for seed, noisy in ((0, True), (1, True))
    ]
    printed = report(tmp_path, paths)
    assert "the interval includes 0" in printed
    even = tmp_path / "even"
    printed = report(even, scratch_and_grown(even, speedup=1e-6))
    assert "as many FLOPs (6ND) as scratch" in printed


# Provenance and escaping.


def test_pages_and_figures_have_provenance(runs, tmp_path):
    out = tmp_path / "out"
    report(tmp_path, runs)
    for page in ("comparison.md", "index.html"):
        text = (out / page).read_text()
        for each in ("6 layers x 16 channels", "shards (data/test), bytes", "0.01", runs[0]):
            assert str(each) in text, (page, each)
    figure = sign(Figure(), trace([read_record(path) for path in runs]))
    printed = figure.get_supxlabel()
    assert "data: shards (data/test)" in printed
    assert str(runs[-1]) in printed.replace("\n", "")


HOSTILE = "<b>|x|$a_{b}$ *y*"


def test_names_are_escaped(tmp_path):
    paths = [
        write_run(tmp_path / HOSTILE / "scratch", grown=False, **{"data.path": HOSTILE}),
        write_run(tmp_path / HOSTILE / "grown"),
    ]
    report(tmp_path, paths)
    html, markdown = (
        (tmp_path / "out" / name).read_text() for name in ("index.html", "comparison.md")
    )
    assert "<b>" not in html
    assert "&lt;b&gt;|x|$a_{b}$ *y*" in html
    assert re.search(r"[^\\]<b>", markdown) is None
    table = [line for line in markdown.splitlines() if line.startswith("| scratch")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 9 for line in table)


# Damage.


def damaged(path, change):
    run = write_run(path)
    change(run)
    return run


def with_row(fields):
    def change(run):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row("train", 1, 2e17, 2.0) | fields) + "\n")

    return change


DAMAGED = {
    "no rows": (lambda run: (run / "metrics.jsonl").write_text(""), "no training rows"),
    "no file": (lambda run: (run / "metrics.jsonl").unlink(), "no training rows"),
    "no config": (lambda run: (run / "config.json").write_text(""), "config.json is damaged"),
    "a list": (lambda run: (run / "config.json").write_text("[]"), "it is []"),
    "no seed": (
        lambda run: (run / "config.json").write_text(
            json.dumps({"config": {"model_is": "target"}, "data": "", "tokenizer": ""})
        ),
        "lacks seed",
    ),
    "no speed": (with_row({"tokens_per_second": 0}), "tokens_per_second is 0 in row"),
    "a negative cost": (with_row({"flops": -1}), "flops is -1 in row"),
    "a cost that falls": (with_row({"flops_6nd": 5}), "flops_6nd is 5 in row"),
    "no tokens": (with_row({"tokens": None}), "is damaged at line 83: tokens is 'None'"),
    "tokens fall": (with_row({"tokens": 5}), "at line 83: it belongs before the line above"),
    "text": (with_row({"flops": "many"}), "is damaged at line 83: flops is 'many'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_run_is_refused_with_field_and_value(tmp_path, name):
    change, message = DAMAGED[name]
    with pytest.raises(UserError, match=re.escape(message)):
        read_record(damaged(tmp_path / "run", change))


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_nonpositive_loss_is_refused_and_missing_loss_is_left_out(tmp_path, loss):
    run = damaged(tmp_path / "run", with_row({"loss": None}))
    assert len(read_record(run).curve("train").losses) == 40
    with_row({"loss": loss, "step": 10**6})(run)
    with pytest.raises(UserError, match=f"loss is {loss} at"):
        read_record(run).curve("train")


def test_run_is_finished_at_the_end_of_its_last_stage(tmp_path):
    def is_finished(name, tokens, rows=(), **fields):
        stages = {"stages.0.tokens": 640, "stages.1.tokens": 1000, **fields}
        run = write_run(tmp_path / name, **stages)
        found = [
            row("train", 0, 6.4e8, 5.0),
            seam(1, 6.4e8),
            row("train", 1, 1e6 * tokens, 4.0),
            *rows,
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
        return read_record(run).is_finished

    # A step has 64 tokens, so 1000 tokens are 16 steps.
    assert is_finished("whole", 640 + 1024)
    assert not is_finished("a step before", 640 + 960)
    half = {"stages.1.tokens": None, "stages.1.fraction": 0.5}
    assert is_finished("fraction", 640 + 640, **half)
    assert not is_finished("part of a fraction", 640 + 576, **half)
    of_first = {"stages.0.tokens": None, "stages.0.fraction": 0.5}
    assert is_finished("fraction first", 640 + 1024, **of_first)
    trigger = row("trigger", 1, 1e6 * 768, None) | {"reason": "the held-out loss is low"}
    assert is_finished("until", 768, [trigger], **half)
