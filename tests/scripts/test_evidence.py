"""Tuned runs: learning rates to try, the store of finished runs, and the table."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from scripts import evidence
from scripts.early_losses import EarlyLossesConfig, early_losses, loss_at
from scripts.evidence import EvidenceConfig, answer, load_arms, next_rates
from scripts.evidence_report import Arm, best_rate, finished, scratch_of, table
from scripts.run_store import RunStore, StoredRun
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand

QUESTIONS = sorted(
    path for path in Path("configs/evidence").glob("*.py") if path.stem != "bench"
)


@pytest.mark.parametrize("exponent", [-5, -1, 0, 3, 7])
def test_best_rate_ends_with_a_tried_neighbor_on_both_sides(exponent):
    losses: dict[float, float] = {}
    while rates := next_rates(losses, 4e-3):
        assert not losses.keys() & set(rates)
        losses |= {rate: abs(math.log2(rate / 4e-3) - exponent) for rate in rates}
    best = min(losses, key=losses.__getitem__)
    assert best == 4e-3 * 2**exponent
    assert {best / 2, 2 * best} <= losses.keys()
    assert len(losses) == 3 + abs(exponent)


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_arms_of_a_group_have_equal_flops_and_a_run_from_scratch(path):
    ends: dict[tuple[str, ...], list[float]] = {}
    for labels, config in load_arms(path).items():
        values = dict(labels)
        group = (values.get("layers", ""), labels[-1][1])
        ends.setdefault(group, []).append(float(expand(config)[-1].end.flops_6nd))
        others = [Arm(each, {}, 1.0, (), 1.0) for each in load_arms(path)]
        assert scratch_of(Arm(labels, {}, 1.0, (), 1.0), others) is not None
    for flops in ends.values():
        assert max(flops) < 1.003 * min(flops)


def stored(loss, *, seed=1, rate=1e-3, flops=1.0, tokens=10.0):
    return StoredRun(
        rate=rate,
        seed=seed,
        evaluations=((1.0, flops / 2, flops, loss + 1), (tokens, flops, 2 * flops, loss)),
        growths=(),
        device_seconds=1.5,
        data="abc",
        jax="0.10",
    )


def arm(run, length, losses, *, flops=1.0, schedule=""):
    labels = (("run", run), ("schedule", schedule), ("length", length))
    runs = [stored(loss, seed=seed, flops=flops) for seed, loss in enumerate(losses, 1)]
    tuning = {5e-4: losses[0] + 0.25, 1e-3: losses[0], 2e-3: losses[0] + 0.5}
    return Arm(labels, tuning, 1e-3, runs, device_seconds=1.5)


def test_table_has_gaps_with_intervals_and_flops_of_scratch_for_the_same_loss():
    # From scratch, the loss is 3 / FLOPs^0.1; the grown runs reach it with 20 % fewer FLOPs.
    noise = np.array([-0.01, 0.0, 0.01])
    arms = [
        arm("scratch", name, 3 * flops**-0.1 + noise, flops=flops)
        for name, flops in (("1", 1.0), ("4", 4.0), ("16", 16.0))
    ]
    arms += [
        arm("stack", name, 3 * (1.25 * flops) ** -0.1 + noise, flops=flops, schedule="wsd")
        for name, flops in (("1", 1.0), ("4", 4.0), ("16", 16.0))
    ]
    lines = table(arms).splitlines()[2:8]
    for line in lines[:3]:
        assert [cell.strip() for cell in line.split("|")[8:10]] == ["", ""]
    # Student's t with two degrees of freedom on each side, equal variances: four together.
    margin = 2.7764451 * math.sqrt(2 * 0.01**2 / 3)
    for line, flops in zip(lines[3:], (1, 4, 16), strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[3:6] == ["0.001", "+0.250", "+0.500"]
        # Student's t with two degrees of freedom.
        mean = 3 * (1.25 * flops) ** -0.1
        assert cells[6] == f"{mean:.4f} ± {4.3026527 * 0.01 / math.sqrt(3):.3f}"
        gap = mean - 3 * flops**-0.1
        expected = f"{gap:+.3f} [{gap - margin:+.3f}, {gap + margin:+.3f}]"
        assert cells[7] == expected
        # Beyond the last length from scratch, the law continues.
        assert cells[8].startswith("~ 20 % [" if flops == 16 else "20 % [")
        low, high = (float(end) for end in re.findall(r"-?\d+", cells[8])[1:])
        assert low < 20 < high


def test_empty_label_of_scratch_fits_every_arm():
    plain, other = arm("scratch", "1", [1.0]), arm("scratch", "1", [1.0], schedule="cosine")
    grown = arm("stack", "1", [1.0], schedule="wsd")
    assert scratch_of(grown, [other, plain]) is plain
    assert scratch_of(grown, [other]) is None


def test_store_knows_a_run_by_its_config_besides_rate_seed_and_workdir(uncut, world, tmp_path):
    config = world.config(workdir=uncut)
    store = RunStore(tmp_path / "runs.jsonl")
    assert store.runs(config) == {}
    store.add(config)
    read = RunStore(tmp_path / "runs.jsonl")
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=0.5)
    for same in (
        config,
        dataclasses.replace(config, seed=7, workdir="elsewhere", optimizer=optimizer),
    ):
        [(label, run)] = read.runs(same).items()
        assert label == (config.optimizer.peak_learning_rate, config.seed)
        assert run == store.runs(config)[label]
    assert run.evaluations[-1][0] == expand(config)[-1].end.tokens
    assert run.evaluations[-1][1] == float(expand(config)[-1].end.flops_6nd)
    assert [tokens for tokens, _, _ in run.growths] == [
        phase.start.tokens for phase in expand(config) if phase.stage
    ]
    model = dataclasses.replace(config.model, norm_epsilon=1e-3)
    assert read.runs(dataclasses.replace(config, model=model)) == {}


def test_field_newer_than_the_store_has_its_default(uncut, world, tmp_path):
    config, path = world.config(workdir=uncut), tmp_path / "runs.jsonl"
    RunStore(path).add(config)
    first, second = map(json.loads, path.read_text().splitlines())
    del first["fields"]["model.loops"]
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    assert len(RunStore(path).runs(config)) == 1
    # A later run of the same config joins the earlier one.
    later = dataclasses.replace(config, seed=config.seed + 1)
    RunStore(path).add(later)
    assert len(path.read_text().splitlines()) == 3
    assert len(RunStore(path).runs(config)) == 2
    model = dataclasses.replace(config.model, loops=2)
    assert RunStore(path).runs(dataclasses.replace(config, model=model)) == {}


@pytest.mark.parametrize("line", ["{", '{"config": 3}', '{"config": "a", "rate": "x"}'])
def test_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(f'{{"config": "a", "fields": {{}}}}\n{line}\n')
    with pytest.raises(UserError, match=r"^line 2 of .*runs\.jsonl is no run \(.*remove the"):
        RunStore(path)


QUESTION = """
import dataclasses
from pathlib import Path
from stackjax.config_file import read_config

def get_arms():
    config = dataclasses.replace(read_config(Path("{config}")), workdir="{runs}")
    scratch = dataclasses.replace(
        config, stages=(dataclasses.replace(config.stages[-1], growth=None),)
    )
    return [
        (dict(run=name, length="1"), each)
        for name, each in (("scratch", scratch), ("stack", config))
    ]
"""


@pytest.fixture
def question(world, tmp_path):
    path = tmp_path / "question.py"
    path.write_text(QUESTION.format(config=world.path / "config.py", runs=tmp_path / "runs"))
    return EvidenceConfig(config=path, output=tmp_path / "out", seeds=2)


def test_arms_are_tuned_then_repeated_and_nothing_trains_twice(question, monkeypatch, capsys):
    trained = []

    def train(runs, jobs, may_diverge):
        for (name, seed), config in runs.items():
            trained.append((name.split(", ")[0], config.optimizer.peak_learning_rate, seed))
            yield (name, seed), False

    def read(config):
        rate = config.optimizer.peak_learning_rate
        return stored(3 + abs(math.log2(rate / first)), seed=config.seed, rate=rate)

    arms = load_arms(question.config)
    first = next(iter(arms.values())).optimizer.peak_learning_rate
    monkeypatch.setattr(evidence, "train_all", train)
    monkeypatch.setattr("scripts.run_store._read", read)
    answer(question)
    tuning = [(first / 2, 0), (first, 0), (2 * first, 0)]
    fresh = [(first, 1), (first, 2)]
    names = ("scratch", "stack")
    expected = [(name, *run) for runs in (tuning, fresh) for name in names for run in runs]
    assert trained == expected
    text = capsys.readouterr().out
    assert (question.output / "question.md").read_text() in text
    assert (question.output / "question.png").stat().st_size > 10_000
    answer(question)
    assert trained == expected
    # Another seed trains alone.
    answer(dataclasses.replace(question, seeds=3))
    assert trained[len(expected) :] == [(name, first, 3) for name in names]


def test_run_that_diverges_has_an_infinite_loss(uncut, world, question, tmp_path):
    config = world.config(workdir=uncut)
    store = RunStore(tmp_path / "runs.jsonl")
    store.add(config)
    other = dataclasses.replace(config.optimizer, peak_learning_rate=0.5)
    store.add(dataclasses.replace(config, optimizer=other), diverged=True)
    losses = {
        rate: run.loss
        for (rate, _), run in RunStore(tmp_path / "runs.jsonl").runs(config).items()
    }
    assert losses[0.5] == math.inf
    assert best_rate(losses) == config.optimizer.peak_learning_rate


def test_different_data_in_a_question_is_refused(question, monkeypatch):
    arms = load_arms(question.config)
    found = iter("ab")

    class Store:
        def runs(self, config):
            data = next(found)
            return {
                (1.0, seed): dataclasses.replace(stored(1.0, seed=seed), data=data)
                for seed in (0, 1)
            }

    with pytest.raises(UserError, match=r"read different data, a and b; .*--output"):
        finished(arms, Store())


def test_page_without_markers_is_refused_before_training(question, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "train_all", None)
    page = tmp_path / "page.md"
    with pytest.raises(UserError, match=r"page\.md must have one <!-- begin question -->"):
        answer(dataclasses.replace(question, page=page))
    page.write_text("before\n<!-- begin question -->\n<!-- end question -->\nafter\n")
    answer(dataclasses.replace(question, page=page, report=True))


def test_report_trains_nothing(question, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "train_all", None)
    answer(dataclasses.replace(question, report=True))
    assert "no arm is finished" in capsys.readouterr().out


def test_equal_labels_are_refused(question):
    text = question.config.read_text().replace('("stack", config)', '("scratch", config)')
    question.config.write_text(text)
    with pytest.raises(UserError, match=r"has two arms scratch, 1\.$"):
        load_arms(question.config)


def test_loss_at_a_share_of_the_flops_is_that_of_the_final_model():
    losses = ((1, 1, 1, 5.0), (5, 5, 5, 3.0), (10, 10, 10, 2.9))
    run = dataclasses.replace(stored(1.0), evaluations=losses)
    assert loss_at(run, 0.5) == 3.0
    assert loss_at(run, 0.75) == pytest.approx(2.95)
    grown = dataclasses.replace(run, growths=((4.0, 4.5, 4.6),))
    assert math.isnan(loss_at(grown, 0.3))
    assert loss_at(grown, 0.5) == 3.0


def test_table_of_early_losses_has_rank_correlation_and_regret(tmp_path, monkeypatch):
    early, last = [3.0, 3.2, 3.1, 4.0, 3.5], [2.9, 2.7, 2.8, 1.0, 2.75]
    arms = [
        Arm(
            (("run", str(i)),),
            {},
            1.0,
            (dataclasses.replace(stored(1.0), evaluations=((5, 5, 5, a), (10, 10, 10, b))),),
            1.0,
        )
        for i, (a, b) in enumerate(zip(early, last, strict=True))
    ]
    monkeypatch.setattr("scripts.early_losses.load_arms", lambda path: {})
    monkeypatch.setattr("scripts.early_losses.finished", lambda arms_of, store: arms)
    text = early_losses(EarlyLossesConfig(configs=(Path("question.py"),), output=tmp_path))
    rows = {
        cells[4].strip(): cells[5:7]
        for cells in (line.split("|") for line in text.splitlines()[2:])
    }
    # Ranks at 60 % are those at 50 %: 0 2 1 4 3 early, 4 1 3 0 2 at the end.
    differences = np.array([0 - 4, 2 - 1, 1 - 3, 4 - 0, 3 - 2])
    expected = 1 - 6 * np.sum(differences**2) / (5 * (25 - 1))
    correlation, regret = (cell.strip() for cell in rows["60 %"])
    assert float(correlation) == pytest.approx(expected, abs=0.005)
    assert regret == "1.900"
