"""Constraints on config fields: types, ranges and fields without effect."""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import pickle
import random
import re
import typing
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import pytest
from conftest import tiny_model, tiny_run

from stackjax.config import (
    Config,
    EarlyStop,
    ProbeConfig,
    Rewarm,
    Schedule,
    SpikeConfig,
    TasksConfig,
)
from stackjax.config_file import flatten
from stackjax.growth import Growth, Stack, parse_growth
from stackjax.growth.base import operators
from stackjax.model.config import RopeScaling
from stackjax.optimizers import AdamW, Muon
from stackjax.options import Sampling
from stackjax.runtime.constraints import Checked, OnlyWith
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Decay, Positive, Share, Size, Text
from stackjax.runtime.ranges import Length, Range, Rational, Real, Whole
from stackjax.sharding.config import MeshConfig
from stackjax.training.preflight import check

COMMANDS = {
    "stackjax": (
        "data.config.PrepareConfig",
        "options.CompareConfig",
        "options.ConvertConfig",
        "options.EvaluateConfig",
        "options.FitConfig",
        "options.GenerateConfig",
        "options.GrowConfig",
        "options.InspectConfig",
        "options.IsoflopConfig",
        "options.PlanConfig",
        "options.ResumeConfig",
        "options.ScaleConfig",
        "options.TrainOptions",
    ),
    "scripts": (
        "bakeoff.BakeoffConfig",
        "benchmark.BenchmarkConfig",
        "peers.__main__.PeersConfig",
        "performance.PerformanceConfig",
        "scale.Options",
        "sweep.SweepConfig",
    ),
}
ROOTS = ["stackjax.config.Config"] + [
    f"{package}.{name}" for package, names in COMMANDS.items() for name in names
]


def config_class(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)


def alternatives(hint, rules=()):
    """Yields each type in a union, with annotations."""
    if typing.get_origin(hint) is Annotated:
        hint, *more = typing.get_args(hint)
        yield from alternatives(hint, (*rules, *more))
    elif type(None) in typing.get_args(hint) or "Union" in str(type(hint)):
        for each in typing.get_args(hint):
            yield from alternatives(each, rules)
    else:
        yield hint, rules


def scalars(kind, path=""):
    """Yields the path, type and rules of every scalar in a dataclass."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for alternative, rules in alternatives(hint):
            inside = f"{path}.{name}".lstrip(".")
            if dataclasses.is_dataclass(alternative):
                yield from scalars(alternative, inside)
            elif typing.get_origin(alternative) is tuple:
                for item, more in alternatives(typing.get_args(alternative)[0]):
                    if dataclasses.is_dataclass(item):
                        yield from scalars(item, f"{inside}.0")
                    else:
                        yield f"{inside}.0", item, (*rules, *more)
            else:
                yield inside, alternative, rules


@pytest.mark.parametrize("root", [*ROOTS, *(f"growth.{name}" for name in operators())])
def test_every_number_has_a_range_and_every_config_is_checked(root):
    is_growth = root.startswith("growth.")
    kind = operators()[root.removeprefix("growth.")] if is_growth else config_class(root)
    assert issubclass(kind, Growth if is_growth else Checked)
    for path, alternative, rules in scalars(kind):
        if alternative in (int, float, Fraction):
            assert any(isinstance(rule, Range) and rule.bounds for rule in rules), path


# Single rules.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: Decay = 0.5
    kind: typing.Literal["a", "b"] = "a"
    only_b: Annotated[Size | None, OnlyWith(kind="b")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Checked):
    size: Size = 1
    share: Share = 0.5
    scale: Positive = 1.0
    side: typing.Literal[-1] | Size = -1
    ratio: Annotated[int | Fraction, Rational(at_least=1)] = 1
    flag: bool = False
    text: Text = "text"
    path: Path = Path()
    sizes: Annotated[tuple[Size, ...], Length(at_most=3)] = (1,)
    labels: list | tuple = ()
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    optional: Size | None = None
    needs_size: Annotated[int, Whole(at_least=0, at_most=9), OnlyWith("optional")] = 0
    growth: Growth | None = None


ACCEPTED = [
    {"size": 1},
    {"size": 2**20},
    {"share": 0},
    {"scale": 10**3},
    {"share": 1.0},
    {"scale": 1e-37},
    {"side": -1},
    {"side": 5},
    {"sizes": (1, 2, 3)},
    {"text": "Zürich 東京"},
    {"inner": Inner(kind="b", only_b=2)},
    {"optional": 1, "needs_size": 3},
    {"growth": Stack(2)},
]

REFUSED = [
    ({"size": 0}, "size is 0; it must be at least 1."),
    ({"size": True}, "size is True, of type bool"),
    ({"size": 2.0}, "size is 2.0, of type float"),
    ({"size": "2"}, "size is '2', of type str"),
    ({"size": np.int32(2)}, "of type int32"),
    ({"size": None}, "size is None, of type NoneType"),
    ({"size": 10**5000}, "size is a number of 5001 digits"),
    ({"share": np.float64(0.5)}, "of type float64"),
    ({"share": 1.5}, "share is 1.5; it must be at least 0 and at most 1."),
    ({"share": math.nan}, "share is nan"),
    ({"scale": math.inf}, "scale is inf"),
    ({"scale": 1e300}, "scale is 1e+300; it must be a number that float32 can hold"),
    ({"scale": 1e-300}, "scale is 1e-300"),
    ({"share": 1e-40}, "share is 1e-40"),
    ({"scale": 10**400}, "scale is a number of 401 digits"),
    ({"scale": 0}, "scale is 0; it must be more than 0."),
    ({"side": 0}, "side is 0; it must be -1, or at least 1."),
    ({"flag": 1}, "flag is 1, of type int"),
    ({"text": ""}, "text is ''; it must be from 1 to 4096 long."),
    ({"text": b"x"}, "text is b'x', of type bytes"),
    ({"text": "a\0b"}, r"text is 'a\x00b', with a character that no file can hold"),
    ({"text": "\ud800"}, r"text is '\ud800', with a character that no file can hold"),
    ({"path": "here"}, "path is 'here', of type str"),
    ({"path": Path("a\0b")}, "with a character that no file can hold"),
    ({"sizes": [1]}, "sizes is [1], of type list"),
    ({"sizes": (1, 2, 3, 4)}, "sizes is (1, 2, 3, 4); it must be from 1 to 3 long."),
    ({"sizes": (1, 0)}, "sizes.1 is 0; it must be at least 1"),
    ({"labels": ["a"]}, "labels is ['a'], which can change"),
    ({"labels": (["a"],)}, "labels is (['a'],), which can change"),
    ({"inner": None}, "inner is None, of type NoneType"),
    ({"inner": Inner(rate=1)}, "inner.rate is 1; it must be at least 0 and less than 1."),
    ({"inner": Inner(rate=1 - 1e-9)}, "inner.rate is 0.999999999"),
    ({"inner": Inner(kind="c")}, "inner.kind is 'c'; it must be 'a' or 'b'."),
    ({"inner": Inner(kind=["a"])}, "inner.kind is ['a'], of type list"),
    ({"inners": (Inner(), 3)}, "inners.1 is 3, of type int"),
    ({"inners": (Inner(), Inner(rate=-1))}, "inners.1.rate is -1; it must be at least 0"),
    (
        {"inner": Inner(only_b=2)},
        "inner.only_b is 2, which has no effect while inner.kind is 'a'",
    ),
    ({"needs_size": 3}, "needs_size is 3, which has no effect while optional is None"),
    ({"optional": 0}, "optional is 0; it must be at least 1, or None."),
    ({"growth": "stack(2)"}, "growth is 'stack(2)', of type str"),
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_value_in_range_is_unchanged(fields):
    outer = Outer(**fields)
    assert {name: getattr(outer, name) for name in fields} == fields
    assert type(outer.share) is type(outer.scale) is float
    assert pickle.loads(pickle.dumps(outer)) == outer and hash(outer) == hash(Outer(**fields))


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_value_out_of_range_is_refused(fields, message):
    with pytest.raises(UserError) as raised:
        Outer(**fields)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("rule", "text", "value"),
    [
        (Whole(), "2e6", 2_000_000),
        (Whole(), "1_280", 1280),
        (Whole(), "-1", -1),
        (Whole(), "123456789012345678901", 123456789012345678901),
        (Real(), "1e-3", 1e-3),
    ],
)
def test_command_line_numbers_are_parsed(rule, text, value):
    parsed = rule.instance_from_str([text])
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("text", ["0.5", "nan", "inf", "1e400", "", "many", "9" * 5000])
def test_text_without_an_integer_is_refused(text):
    with pytest.raises(UserError, match="is not a whole number"):
        Whole().instance_from_str([text])


# Fields without effect.

OPTIMIZER = AdamW(peak_learning_rate=1e-2)
STAGE = tiny_run().stages[0]

WITHOUT_EFFECT = {
    "optimizer.schedule.decay_tokens": ({"decay_tokens": 5}, {"shape": "wsd"}),
    "optimizer.schedule.final_fraction": (
        {"shape": "constant", "final_fraction": 0.5},
        {"shape": "cosine"},
    ),
    "optimizer.schedule.horizon_tokens": (
        {"shape": "constant", "horizon_tokens": 500},
        {"shape": "cosine"},
    ),
    "optimizer.schedule.axis": ({"shape": "constant", "axis": "run"}, {"warmup_tokens": 64}),
    "stages.0.optimizer_state": ({"optimizer_state": "grow"}, {"growth": Stack(2)}),
    "stages.0.rewarm": ({"rewarm": Rewarm(tokens=64)}, {"growth": Stack(2)}),
    "stages.0.scale_by_fan_in": ({"scale_by_fan_in": True}, {"growth": Stack(2)}),
    "stages.0.until.slope": ({"slope": 0.1}, {"slope_tokens": 5000}),
    "stages.0.until.slope_tokens": ({"slope_tokens": 5000}, {"slope": 0.1}),
    "probes.lag_tokens": ({"lag_tokens": 64}, {"at_tokens": (320,)}),
    "spikes.deviations": ({"deviations": 3.0}, {"action": "skip"}),
    "spikes.window_steps": ({"window_steps": 9}, {"action": "stop"}),
    "tasks.every_tokens": ({"every_tokens": 64}, {"names": ("piqa",)}),
    "tasks.limit": ({"limit": 5}, {"names": ("piqa",)}),
    "tasks.num_fewshot": ({"num_fewshot": 5}, {"names": ("piqa",)}),
    "tasks.batch_size": ({"batch_size": 5}, {"names": ("piqa",)}),
    "tasks.directory": ({"directory": "tasks"}, {"names": ("piqa",)}),
    "top_k": ({"temperature": 0.0, "top_k": 5}, {"temperature": 1.0}),
    "top_p": ({"temperature": 0.0, "top_p": 0.5}, {"temperature": 1.0}),
}


def config_with(field: str, fields: dict[str, Any]) -> Any:
    """Returns the tiny run with changes in the dataclass that has the field."""
    if "." not in field:
        return Sampling(**fields)
    holder = field.rpartition(".")[0]
    if holder.startswith("stages"):
        stage = (
            dataclasses.replace(STAGE, until=EarlyStop(**fields))
            if "until" in holder
            else (dataclasses.replace(STAGE, **fields))
        )
        return tiny_run(stages=(stage,))
    return {
        "optimizer.schedule": lambda: tiny_run(
            optimizer=dataclasses.replace(OPTIMIZER, schedule=Schedule(**fields))
        ),
        "optimizer": lambda: tiny_run(optimizer=dataclasses.replace(OPTIMIZER, **fields)),
        "probes": lambda: tiny_run(probes=ProbeConfig(**fields)),
        "spikes": lambda: tiny_run(spikes=SpikeConfig(**fields)),
        "tasks": lambda: tiny_run(tasks=TasksConfig(**fields)),
    }[holder]()


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_field_without_effect_is_refused(field):
    changes, required = WITHOUT_EFFECT[field]
    with pytest.raises(
        UserError, match=rf"^{re.escape(field)} is .* which has no effect while"
    ):
        config_with(field, changes)
    config_with(field, changes | required)


# Mutations of every scalar in a run.

ODD_VALUES = [
    *(None, True, -1, 0, 1, 2, 3, 7, 255, 2**16, 2**31, 2**63, 10**9, 10**12, 10**18, 10**30),
    *(10**400, -0.0, 0.5, 1.0, 2e6, 1e-320, 1e300, -1e-9, math.nan, math.inf, -math.inf),
    *("", "1", "none", "a\0", "\ud800", "x" * 5000, b"x", [], [1], {}, set(), (), (1,), ("",)),
    *(np.int32(1), np.float64(0.5), np.zeros(3), Fraction(1, 2), 1j, print),
]

FULL_RUN = tiny_run(
    model=tiny_model(num_layers=6, rope_scaling=RopeScaling()),
    optimizer=Muon(peak_learning_rate=1e-2, schedule=Schedule(shape="wsd", decay_tokens=64)),
    stages=(
        dataclasses.replace(STAGE, until=EarlyStop(slope=0.1, slope_tokens=5000)),
        dataclasses.replace(
            tiny_run().stages[1],
            growth=Stack(2),
            rewarm=Rewarm(tokens=64),
            schedule=Schedule(warmup_tokens=64),
            mesh=MeshConfig(),
        ),
    ),
    probes=ProbeConfig(at_tokens=(320,), lag_tokens=64),
    tasks=TasksConfig(names=("piqa",), every_tokens=64),
    seed=1,
)
"""A run with every field set."""


def leaves(value: Any, path: str = "") -> list[str]:
    """Returns the path of every scalar in a run."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Growth):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and value:
        items = dict(enumerate(value))
    else:
        return [path]
    return [leaf for name, item in items.items() for leaf in leaves(item, f"{path}.{name}")]


def with_value(holder: Any, path: list[str], value: Any) -> Any:
    """Returns a run, or part of a run, with a scalar replaced."""
    if not path:
        return value
    name, *rest = path
    if isinstance(holder, tuple):
        index = int(name)
        return (*holder[:index], with_value(holder[index], rest, value), *holder[index + 1 :])
    inner = with_value(getattr(holder, name), rest, value)
    return dataclasses.replace(holder, **{name: inner})


def is_valid(path: str, value: Any) -> bool:
    """Returns whether an accepted value is plain, finite and not negative."""
    if isinstance(value, tuple):
        return all(is_valid(path, item) for item in value)
    if path.endswith("growth"):
        return value is None or isinstance(value, Growth)
    if isinstance(value, float | int) and not isinstance(value, bool):
        least = -1 if "mesh." in path else 0
        return type(value) in (int, float) and math.isfinite(value) and value >= least
    return value is None or (type(value) in (bool, str) and "\0" not in str(value))


@functools.cache
def accepted_mutations() -> list[tuple[str, Any, Config]]:
    """Returns the accepted mutations; all others are refused in one line."""
    accepted = []
    for path in (leaf.lstrip(".") for leaf in leaves(FULL_RUN)):
        for value in ODD_VALUES:
            try:
                config = with_value(FULL_RUN, path.split("."), value)
            except UserError as error:
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 700, error
                continue
            assert is_valid(path, value), (path, value)
            accepted.append((path, value, config))
    return accepted


def test_scalars_of_a_run_accept_only_valid_values():
    assert len({path for path, *_ in accepted_mutations()}) > 60
    for path, value, config in accepted_mutations():
        flat = flatten(config)
        assert json.loads(json.dumps(flat)) == flat, (path, value)
        assert isinstance(hash(config), int)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product(
            ("optimizer.peak_learning_rate", "stages.0.peak_learning_rate"), (11, 1e9)
        ),
        *(("optimizer.epsilon", 2), ("model.norm_epsilon", 2), ("optimizer.z_loss", 2)),
        *(("optimizer.weight_decay", 101), ("optimizer.weight_decay", 1e-40)),
    ],
)
def test_number_beyond_its_limit_is_refused(field, value):
    with pytest.raises(UserError, match=f"{field} is {value}".replace("+", r"\+")):
        with_value(FULL_RUN, field.split("."), value)


def test_accepted_configs_trace_or_are_refused():
    outcomes = {"fits": 0, "refused": 0}
    for path, value, config in random.Random(1).sample(accepted_mutations(), 24):
        try:
            check(config, jax.device_count())
            outcomes["fits"] += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1, (path, value)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 2


HUGE = {
    "data.seq_len": 2**24,
    "model.num_layers": 10_000,
    "model.vocab_size": 2**24,
    "model.embed_dim": 2**22,
    "model.mlp_dim": 2**22,
    "stages.0.batch_size": 2**20,
    "stages.0.tokens": 10**18,
    "optimizer.schedule.warmup_tokens": 10**18,
    "mesh.fsdp": 2**20,
}


@pytest.mark.parametrize("field", HUGE)
def test_largest_sizes_are_checked_fast_in_little_memory(field):
    config = with_value(tiny_run(), field.split("."), HUGE[field])
    try:
        for estimate in check(config, jax.device_count()):
            assert estimate.phase.num_steps < 2**31
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "stack(1e9)",
        "stack(-1)",
        "stack(nan)",
        "stack(1001)",
        "stack(2)+" * 10_000 + "stack(2)",
        "stack(" * 10_000,
        "layer_map(1*1000000000)",
        "layer_map((1..1000000000))",
        "layer_map(1-2*" + "9" * 5000 + ")",
        "layer_map([" + "9" * 5000 + "])",
        "depth_upscale(0)",
        "insert_block(0)",
        "width_split(embed=1001)",
        "width_split(embed=1/2)",
        "width_split(noise=-1)",
        "noise(2)",
        "noise(nan)",
        "learn(2, fit_steps=0)",
        "learn(2, learning_rate=0)",
        "depth_random(2, mask_tokens=0)",
        "width_zero(heads=0)",
    ],
    ids=lambda text: text[:40],
)
def test_invalid_growth_is_refused(text):
    with pytest.raises(UserError) as raised:
        parse_growth(text)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["stack(1000)+stack(1000)", "width_split(embed=1000)+width_split(embed=1000)"]
)
def test_growth_beyond_the_largest_model_is_refused(text):
    model = tiny_model(embed_dim=2048, num_layers=1000)
    with pytest.raises(UserError, match=r"makes \d+ layers|makes model.embed_dim \d+"):
        parse_growth(text).target_config(model)
