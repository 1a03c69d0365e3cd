"""Growth plans: timing, cost, memory, advice, written configs and errors."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_run

from stackjax.analysis.architectures import SHAPES, choose_model
from stackjax.analysis.budget import scratch_tokens
from stackjax.analysis.plan import plan, report
from stackjax.analysis.planning import choose_timing, grown_run
from stackjax.analysis.published import PUBLISHED, nearest_published
from stackjax.config import BatchStep, Stage
from stackjax.config_file import flatten, read_config
from stackjax.growth import Stack
from stackjax.model.flops import flops_6nd, matmul_flops, num_params
from stackjax.options import MeshSizes, PlanConfig
from stackjax.plan import main
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MeshConfig
from stackjax.training.expand import expand
from stackjax.training.preflight import check

# N, D, and d in 1e9 tokens, from arXiv:2405.15319, table 4.
TABLE_4 = {
    "Llama3-8B": (8e9, 15e12, 6.58),
    "Llama2-7B": (7e9, 2e12, 11.11),
    "Llama2-13B": (13e9, 2e12, 15.84),
    "Llama2-70B": (70e9, 2e12, 42.48),
}
TINY = PlanConfig(params=1e8, tokens=2e9)


@pytest.fixture(scope="module")
def inside():
    """A plan within the law's fitted range."""
    return plan(PlanConfig(params=1.1e9, tokens=1e11))


@pytest.mark.parametrize("name", TABLE_4)
def test_timing_matches_table_4_with_warnings(name):
    params, tokens, billions = TABLE_4[name]
    found = plan(PlanConfig(params=params, tokens=tokens))
    assert round(found.timing.tokens / 1e9, 2) == billions
    assert found.timing.rule == "law"
    assert found.factor == 4
    params_warning, flops_warning = found.warnings
    assert (
        f"N is {params:.3g} parameters, {params / 3e9:.3g} times the largest" in params_warning
    )
    assert f"C is {6 * params * tokens:.3g} FLOPs" in flops_warning


def test_no_warning_inside_the_fitted_range(inside):
    assert round(inside.timing.tokens / 1e9, 1) == 11.4
    assert inside.warnings == ()


def test_law_beyond_the_budget_is_refused():
    found = plan(TINY)
    timing = found.timing
    assert timing.law_tokens > 10 * found.tokens
    assert (timing.rule, timing.tokens) == ("scale-free", 0.15 * 2e9)
    refusal, params_warning, flops_warning = found.warnings
    assert "d is 2.14e+10 tokens, 10.7 x D" in refusal
    assert "15 % of D" in refusal
    assert "N is 1e+08 parameters, 1/4.1 of" in params_warning
    assert "C is 1.2e+18 FLOPs, 1/83.3 of" in flops_warning


def test_law_beyond_half_of_the_tokens_is_refused():
    # N and C are in range, but d is 43 billion tokens and D only 12 billion.
    timing = choose_timing(3e9, 12e9)
    assert timing.outside == ()
    assert timing.refused is not None
    # As D grows, d falls and crosses D / 2 once.
    rules = [choose_timing(3e9, billions * 1e9).rule for billions in range(10, 100)]
    assert rules == sorted(rules, reverse=True)
    for billions in range(10, 100):
        timing = choose_timing(3e9, billions * 1e9)
        assert (timing.rule == "law") == (timing.law_tokens <= 0.5 * billions * 1e9)


@pytest.mark.parametrize("options", [TINY, PlanConfig(params=7e9, tokens=2e12)])
def test_run_and_scratch_have_equal_cost_up_to_a_step(options):
    found = plan(options)
    small, target = expand(found.config)
    cost = flops_6nd(target.model) * found.tokens
    assert found.scratch.flops_6nd == cost
    assert 0 <= cost - target.end.flops_6nd < target.per_step.flops_6nd
    assert found.total.flops_6nd == target.end.flops_6nd
    assert found.total.flops == target.end.flops
    assert [stage.tokens for stage in found.stages] == [
        small.end.tokens,
        target.end.tokens - small.end.tokens,
    ]
    # d is rounded up to a whole step.
    assert 0 <= small.end.tokens - found.timing.tokens < small.per_step.tokens
    assert scratch_tokens(found.config) == pytest.approx(found.tokens, rel=5e-3)


def test_break_even_speedup_pays_for_the_small_model(inside):
    _, target = inside.stages
    # At the break-even, the target's stage is `break_even.tokens` shorter than scratch.
    target_tokens = inside.tokens - inside.break_even.tokens
    assert target_tokens == pytest.approx(target.tokens, abs=2 * 1024 * 2048)
    assert inside.tokens / target_tokens - 1 == pytest.approx(
        inside.break_even.speedup, rel=1e-4
    )


@pytest.mark.parametrize(
    ("params", "tokens", "sizes", "low", "high"),
    [
        (1.1e9, 1e11, {"1.1B"}, 0.390, 0.491),
        (3e9, 240e9, {"3B"}, 0.486, 0.545),
        (8e9, 15e12, {"7B", "410M"}, 0.310, 0.553),
        (1e8, 2e9, {"410M", "7B"}, 0.310, 0.531),
    ],
)
def test_savings_come_from_the_nearest_size_and_length(params, tokens, sizes, low, high):
    found = plan(PlanConfig(params=params, tokens=tokens))
    assert {each.name for each in found.saving.published} == sizes
    assert found.saving.fewer_flops == (1 - 1 / (1 + low), 1 - 1 / (1 + high))
    assert found.saving.flops_6nd[0] == found.scratch.flops_6nd * found.saving.fewer_flops[0]


@pytest.mark.parametrize("row", PUBLISHED, ids=str)
def test_published_run_is_nearest_to_itself(row):
    assert row in nearest_published(row.params, row.tokens)


def test_speedup_of_a_half_saves_a_third_of_the_flops():
    row = dataclasses.replace(PUBLISHED[0], speedup=0.5)
    assert row.fewer_flops == pytest.approx(1 / 3)


def sources(found):
    return [advice.source for advice in found.advice]


def test_conflicting_advice_is_listed(inside):
    late, safest, measured = "arXiv:2511.04981", "arXiv:2605.13405", "docs/evidence.md"
    # 11.4 % of D satisfies the scale-free rule, but is 26 tokens per small parameter.
    assert sources(inside) == ["arXiv:2510.08008", measured, late, safest]
    far = plan(PlanConfig(params=8e9, tokens=15e12))
    assert sources(far) == ["scale-free rule", measured, late, safest]
    assert "1.5e+12 to 3e+12 tokens instead of 6.58e+09" in far.advice[0].text
    twice = plan(dataclasses.replace(TINY, factor=2))
    assert sources(twice) == [measured, late]
    assert sources(plan(dataclasses.replace(TINY, factor=8)))[-1] == "arXiv:2405.15319"


def test_growth_factor_counts_non_embedding_parameters(inside):
    small, target = inside.stages
    # Only the final norm does not scale with depth.
    assert target.non_embedding_params / small.non_embedding_params == pytest.approx(
        4, rel=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_nominal_size_gives_the_named_architecture(shape):
    model, name = choose_model(shape.params)
    assert (model, name) == (shape.model(), shape.name)
    # The paper's nominal sizes are up to 25 % off.
    assert num_params(model) == pytest.approx(shape.params, rel=0.25)
    assert model.num_layers % 4 == 0


@pytest.mark.parametrize("params", [4e7, 1e8, 2.2e8, 7e8, 1.7e9, 5e9, 1e10, 3.4e10, 4e11])
def test_other_sizes_give_a_resized_architecture(params):
    model, name = choose_model(params)
    assert num_params(model) == pytest.approx(params, rel=0.02)
    assert name.endswith(", resized")
    assert model.embed_dim % 128 == model.mlp_dim % 128 == model.num_layers % 4 == 0
    assert model.embed_dim == model.num_heads * model.head_dim
    assert model.num_kv_heads >= 4


@pytest.mark.parametrize(
    "budget", [{"flops": 6 * 1.1e9 * 1e11}, {"device_hours": 1e11 / 3.6e6}]
)
def test_budgets_are_equivalent(inside, budget):
    found = plan(PlanConfig(params=1.1e9, tokens_per_second=8e3, devices=8, **budget))
    assert found.tokens == pytest.approx(1e11)
    assert found.timing.tokens == pytest.approx(inside.timing.tokens)
    assert [each.tokens for each in found.stages] == [each.tokens for each in inside.stages]


def benchmark(tmp_path, *rows):
    """Writes a scripts/benchmark.py result for eight devices."""
    path = tmp_path / "benchmark.json"
    path.write_text(
        json.dumps(
            {
                "num_devices": 8,
                "rows": [
                    {"section": section, "phase": phase, "case": "", "values": values}
                    for section, phase, values in rows
                ],
            }
        )
    )
    return path


def sizes(model, seq_len=2048):
    return {"params": num_params(model), "num_layers": model.num_layers, "seq_len": seq_len}


TARGET, _ = choose_model(1.1e9)
SMALL = Stack(4).source_config(TARGET)
SMALL_ROWS = (
    ("model", "stage_0/train", sizes(SMALL)),
    ("step", "stage_0/train", {"tokens_per_second": 20e3}),
)
TARGET_ROWS = (
    ("model", "stage_1/train", sizes(TARGET)),
    ("step", "stage_1/train", {"tokens_per_second": 8e3}),
)


def test_device_hours_use_measured_speeds(tmp_path):
    path = benchmark(tmp_path, *SMALL_ROWS, *TARGET_ROWS)
    found = plan(PlanConfig(params=1.1e9, tokens=1e11, benchmark=path))
    small, target = found.stages
    assert not found.speed.small_is_estimate
    assert small.device_hours == pytest.approx(small.tokens / 2.5e3 / 3600)
    assert target.device_hours == pytest.approx(target.tokens / 1e3 / 3600)
    assert found.total.device_hours == small.device_hours + target.device_hours
    assert found.scratch.device_hours == pytest.approx(1e11 / 1e3 / 3600)
    assert found.num_devices == 8
    # Device-hours saved when the grown run reaches scratch's loss.
    for share, hours in zip(found.saving.fewer_flops, found.saving.device_hours, strict=True):
        rest = (1 - share) * found.tokens - found.break_even.tokens
        spent = small.device_hours + rest / 1e3 / 3600
        assert hours == pytest.approx(found.scratch.device_hours - spent)


def test_unmeasured_small_model_is_estimated_from_flops(tmp_path):
    path = benchmark(
        tmp_path,
        SMALL_ROWS[0],
        ("step", "stage_0/train", {"not_measured": "no room"}),
        *TARGET_ROWS,
    )
    found = plan(PlanConfig(params=1.1e9, tokens=1e11, benchmark=path))
    stated = plan(PlanConfig(params=1.1e9, tokens=1e11, tokens_per_second=8e3, devices=8))
    assert found.speed == stated.speed
    assert found.speed.small_is_estimate
    ratio = matmul_flops(TARGET, 2048) / matmul_flops(SMALL, 2048)
    assert found.speed.small == pytest.approx(ratio * 1e3)


@pytest.mark.parametrize("tensor", [1, 2])
def test_memory_matches_the_preflight_estimate(tensor):
    mesh = MeshSizes(fsdp=4, tensor=tensor)
    found = plan(PlanConfig(params=1.1e9, tokens=1e11, mesh=mesh))
    assert found.config.mesh == MeshConfig(fsdp=4, tensor=tensor)
    assert found.num_devices == 4 * tensor
    estimates = check(found.config, 4 * tensor)
    assert [stage.memory_bytes for stage in found.stages] == [
        each.state_bytes + each.gradient_bytes for each in estimates
    ]


def test_plan_of_a_config_changes_only_stages_and_workdir():
    path = Path("configs/gstack_1b.py")
    before, found = read_config(path), plan(PlanConfig(config=path, tokens=1e11))
    assert found.params == num_params(before.model)
    assert round(found.timing.tokens / 1e9, 2) == round(
        choose_timing(num_params(before.model), 1e11).tokens / 1e9, 2
    )
    after, kept = flatten(found.config), flatten(before)
    changed = {field for field in after.keys() | kept if after.get(field) != kept.get(field)}
    assert changed == {"stages.0.tokens", "stages.1.tokens", "workdir"}
    assert found.warnings == ()


def test_config_with_source_model_is_planned_for_its_target():
    config = tiny_run(model_is="source", stages=tiny_run().stages)
    template = dataclasses.replace(config, mesh=MeshConfig(fsdp=2))
    planned = grown_run(template, 3, 640, 6400)
    assert planned.model == expand(config)[-1].model
    assert [phase.model.num_layers for phase in expand(planned)] == [4, 12]
    assert [stage.batch_size for stage in planned.stages] == [16, 16]
    assert planned.mesh == MeshConfig(fsdp=2)


def test_scratch_config_gives_its_rate_to_both_stages():
    path = Path("configs/scratch_1b.py")
    found = plan(PlanConfig(config=path, tokens=1e11))
    peaks = [phase.learning_rate.peak for phase in expand(found.config)]
    assert peaks == [3e-4, 3e-4]


def test_warmup_longer_than_its_stage_is_cut_with_a_warning():
    found = plan(PlanConfig(config=Path("configs/gstack_1b.py"), tokens=3e10))
    refusal, warning = found.warnings
    assert refusal == found.timing.refused
    assert "warm-up of stage 0 is 6.29e+09 tokens" in warning
    small, target = (
        stage.schedule or found.config.optimizer.schedule for stage in found.config.stages
    )
    assert small.warmup_tokens == found.stages[0].tokens // 10
    assert dataclasses.replace(small, warmup_tokens=target.warmup_tokens) == target
    # Here the schedule's horizon is the stage, shorter than the warm-up.
    plan(PlanConfig(config=Path("configs/tiny.py"), tokens=3e5))


@pytest.mark.parametrize("tokens", [2e8, 2e9, 1e11, 2e12])
def test_recipe_is_adapted_to_few_tokens(tokens):
    found = plan(PlanConfig(params=1.1e9, tokens=tokens))
    small, target = expand(found.config)
    assert target.batch_size == small.batch_size <= 1024
    assert min(small.num_steps, target.num_steps) >= 200
    if tokens >= 1e11:
        assert target.batch_size == 1024
    for phase in (small, target):
        length = phase.num_steps * phase.per_step.tokens
        warmup = phase.learning_rate.warmup_tokens
        assert warmup <= 0.1 * length
        assert warmup == 3000 * phase.per_step.tokens or warmup > 0.08 * length
    # The small model's learning rate has not decayed before growth.
    assert small.learning_rate.horizon_tokens >= tokens
    assert target.learning_rate.peak == 3e-4


@pytest.mark.parametrize(("fsdp", "tokens"), [(64, 1e11), (512, 1e11), (8, 2e9)])
def test_batches_divide_over_the_devices(fsdp, tokens):
    found = plan(PlanConfig(params=3e9, tokens=tokens, mesh=MeshSizes(fsdp=fsdp)))
    assert found.num_devices == fsdp
    for stage in found.config.stages:
        assert stage.batch_size % (stage.accumulate * fsdp) == 0
        assert stage.batch_size // stage.accumulate <= max(32, fsdp)


@pytest.mark.parametrize(
    "args",
    [
        ["--params", "7e9", "--tokens", "2e12"],
        ["--params", "1e8", "--tokens", "2e9", "--factor", "2", "--mesh.fsdp", "8"],
        ["--config", "configs/gstack_410m.py", "--flops", "2e20"],
        ["--config", "configs/flm_tiny.py", "--tokens", "3e7"],
    ],
    ids=" ".join,
)
def test_written_config_is_the_planned_run(run_main, tmp_path, args):
    path = tmp_path / "planned.py"
    _, out, _ = run_main(main, *args, "--write", path, "--json")
    printed, config = json.loads(out), read_config(path)
    assert json.loads(json.dumps(flatten(config))) == printed["config"]
    assert config.workdir == "runs/planned"
    phases = expand(config)
    assert phases[-1].end.flops_6nd == printed["total"]["flops_6nd"]
    assert phases[-1].growth == Stack(printed["factor"])
    step_tokens = phases[0].per_step.tokens
    assert 0 <= phases[0].end.tokens - printed["timing"]["tokens"] < step_tokens
    assert [phase.model.num_layers for phase in phases] == [
        stage["num_layers"] for stage in printed["stages"]
    ]
    assert [num_params(phase.model) for phase in phases] == [
        stage["params"] for stage in printed["stages"]
    ]
    text = path.read_text()
    assert f"# Written by: python -m stackjax.plan {' '.join(args)}" in text
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) == {
        "dataclasses",
        "pathlib",
        "stackjax",
    } - ({"pathlib"} if "--params" in args else set())
    assert max(len(line) for line in text.splitlines() if not line.startswith("#")) <= 96
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--isolated"]
    subprocess.run([*ruff, "--line-length", "96", path], check=True, capture_output=True)
    assert ("Rates(" in text) == ("--params" in args)


def test_json_has_all_fields(run_main, inside):
    printed = json.loads(run_main(main, "--params", 1.1e9, "--tokens", 1e11, "--json")[1])
    assert printed == json.loads(json.dumps(report(inside)))
    assert printed.keys() == {field.name for field in dataclasses.fields(inside)}
    assert printed["config"]["stages.1.growth"] == "stack(4)"
    assert printed["speed"] is None


def test_printed_plan_fits_a_screen(run_main):
    args = ("--params", 7e9, "--tokens", 2e12, "--devices", 64, "--tokens-per-second", 5e5)
    _, text, _ = run_main(main, *args)
    lines = text.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 96
    assert "d = 11.1B tokens, 0.556 % of D" in text
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert rows["1"][:3] == ["1", "32", "5.93B"]
    assert "small model's speed is an estimate" in text.replace("\n", " ")
    assert text.count("warning") == 2


# Options, and the expected error.
ERRORS = {
    "no model": ({"params": None}, "--params is None and --config is None"),
    "two models": (
        {"config": Path("configs/tiny.py")},
        "--params is 1100000000.0 and --config is configs/tiny.py",
    ),
    "no budget": (
        {"tokens": None},
        "--tokens is None and --flops is None and --device-hours is None",
    ),
    "two budgets": (
        {"flops": 1e20},
        "--tokens is 100000000000.0 and --flops is 1e+20 and --device-hours is None",
    ),
    "negative": ({"tokens": -1.0}, "tokens is -1.0"),
    "infinite": ({"params": math.inf}, "params is inf"),
    "not a number": ({"tokens": math.nan}, "tokens is nan"),
    "no devices": ({"devices": 0}, "devices is 0"),
    "small": ({"params": 1e6}, "--params is 1e+06, too small for a model with 24 layers"),
    "factor": (
        {"factor": 5},
        "--factor is 5; it must divide the target's 24 layers, so take one of [2, 3, 4, 6, 8, "
        "12, 24].",
    ),
    "no growth": ({"factor": 1}, "factor is 1"),
    "hours without a speed": (
        {"tokens": None, "device_hours": 100.0},
        "--device-hours is 100.0, but the target's speed is unknown",
    ),
    "speed of an unknown number of devices": (
        {"tokens_per_second": 1e5},
        "--tokens-per-second is 100000.0 over an unknown number of devices",
    ),
    "two speeds": (
        {"tokens_per_second": 1e5, "benchmark": Path("benchmark.json")},
        "--tokens-per-second is 100000.0 and --benchmark is benchmark.json",
    ),
    "no benchmark": ({"benchmark": Path("nowhere.json")}, "--benchmark is nowhere.json"),
    "no config": (
        {"params": None, "config": Path("nowhere.py")},
        "--config nowhere.py: there is no such file",
    ),
    "mesh": (
        {"devices": 8, "mesh": MeshSizes(fsdp=3)},
        "mesh {'replica': -1, 'fsdp': 3, 'context': 1, 'tensor': 1} does not fit 8 devices",
    ),
    "mesh that does not divide the heads": (
        {"mesh": MeshSizes(fsdp=1, tensor=64)},
        "model.num_heads is 32 in stage 0, which does not divide over 64 shards",
    ),
    "few tokens": ({"tokens": 2.5e3}, "grow earlier, or increase the budget"),
    "hardly a FLOP": (
        {"tokens": None, "flops": 2.0},
        "the budget is 3.03e-10 tokens, but a sequence has 2048",
    ),
    "suffix": ({"write": Path("plan.txt")}, "--write is plan.txt"),
    "file that exists": ({"write": Path("configs/tiny.py")}, "--write is configs/tiny.py"),
    "no directory": ({"write": Path("nowhere/plan.py")}, "--write is nowhere/plan.py"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_impossible_plan_is_refused_with_field_and_value(name):
    fields, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(PlanConfig(**({"params": 1.1e9, "tokens": 1e11} | fields)))


def test_benchmark_of_another_model_is_refused(tmp_path):
    longer = ("model", "stage_1/train", sizes(TARGET, seq_len=4096))
    path = benchmark(tmp_path, *SMALL_ROWS, longer, TARGET_ROWS[1])
    with pytest.raises(ValueError) as error:
        plan(PlanConfig(params=1.1e9, tokens=1e11, benchmark=path))
    target, small = f"{num_params(TARGET):,} parameters", f"{num_params(SMALL):,} parameters"
    for model in (
        f"{target}, 24 layers, sequences of 2048",
        f"{small}, 6 layers, sequences of 2048",
        f"{target}, 24 layers, sequences of 4096",
    ):
        assert model in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}'])
def test_damaged_benchmark_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"other\.json is damaged: .*benchmark\.json"):
        plan(PlanConfig(params=1.1e9, tokens=1e11, benchmark=path))


def test_error_is_one_line_and_writes_nothing(run_main, tmp_path):
    path = tmp_path / "planned.py"
    args = ("--params", 1e9, "--tokens", 2500, "--write", path)
    code, _, error = run_main(main, *args)
    assert (code, error.count("\n")) == (2, 1)
    assert "1.5e+13 FLOPs (6ND)" in error
    assert not path.exists()


HOSTILE = [
    "a\nraise SystemExit(1)\n#",
    "a\rraise SystemExit(1)",
    "quotes'\"",
    'three"""quotes',
    "back\\slash\\n{braces}%s",
    "Zürich 東京 😀\u2028\x85\x0c",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_in_a_written_config_are_escaped(monkeypatch, run_main, tmp_path, name):
    path, source = tmp_path / f"{name}.py", tmp_path / "source.py"
    text = f"""
import dataclasses
from gstack_410m import get_config as base

def get_config():
    config = base()
    data = dataclasses.replace(config.data, path={name!r}, cache_dir={name!r})
    logging = dataclasses.replace(config.logging, wandb_project={name!r})
    return dataclasses.replace(config, data=data, logging=logging)
"""
    source.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend("configs")
    args = ("--config", source, "--flops", "2e20", "--write", path)
    assert run_main(main, *args)[0] == 0
    config = read_config(path)
    assert config.workdir == f"runs/{name}"
    assert (config.data.path, config.data.cache_dir, config.logging.wandb_project) == (
        name,
    ) * 3
    # An existing file is not overwritten.
    before = path.read_bytes()
    assert run_main(main, *args)[0] == 2
    assert path.read_bytes() == before


def test_schedules_over_the_tokens_of_a_stage_are_refused():
    steps = (BatchStep(from_tokens=64, batch_size=16),)
    run = tiny_run(stages=(Stage(tokens=640, batch_size=8, batch_steps=steps),))
    with pytest.raises(UserError, match=r"stages\.0 has batch_steps or source_ramp_tokens"):
        grown_run(run, 2, 64, 640)
