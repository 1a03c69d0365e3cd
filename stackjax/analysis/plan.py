"""A plan from command-line options."""

import dataclasses
import json
import shlex
import sys
from typing import Any

from stackjax.analysis.architectures import SEQ_LEN, choose_model, nearest_rates, paper_run
from stackjax.analysis.plan_config import config_text
from stackjax.analysis.plan_text import show
from stackjax.analysis.planning import Plan, batch_shards, choose_timing, make_plan
from stackjax.analysis.throughput import (
    Benchmark,
    Speed,
    estimated_speed,
    measured_speed,
    read_benchmark,
)
from stackjax.config_file import flatten, read_config
from stackjax.growth import Stack
from stackjax.model import ModelConfig
from stackjax.model.flops import num_params
from stackjax.options import PlanConfig
from stackjax.runtime.command_line import program
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MeshConfig
from stackjax.training.stages import stage_models, stage_seq_lens


def write(options: PlanConfig) -> None:
    """Prints a plan, and writes a config file if requested."""
    found = plan(options)
    if options.write is not None:
        text = config_text(found, options, f"{program('plan')} {shlex.join(sys.argv[1:])}")
        with options.write.open("x", encoding="utf-8") as file:
            file.write(text)
    if options.json:
        print(json.dumps(report(found), indent=1))
        return
    print(show(found))
    if options.write is not None:
        print(f"\n{program('train')} --config {shlex.quote(str(options.write))}")


def report(plan: Plan) -> dict[str, Any]:
    """Returns a plan for JSON; unknown numbers are null."""
    return dataclasses.asdict(plan) | {"config": flatten(plan.config)}


def plan(options: PlanConfig) -> Plan:
    """Returns the plan for command-line options.

    Raises:
      UserError: Options contradict each other, or the run is impossible.
    """
    _check_options(options)
    if options.config is not None:
        run = read_config(options.config)
        target, name = stage_models(run)[-1], str(options.config)
        seq_len = stage_seq_lens(run)[-1]
        params, mesh = float(num_params(target)), run.stages[-1].mesh or run.mesh
    else:
        assert options.params is not None, "checked by _check_options"
        run, seq_len, params, mesh = None, SEQ_LEN, options.params, MeshConfig()
        target, name = choose_model(params)
    small = _small_model(options.factor, target)
    sizes = dataclasses.asdict(options.mesh).items()
    mesh = dataclasses.replace(mesh, **{axis: n for axis, n in sizes if n is not None})
    benchmark = None if options.benchmark is None else read_benchmark(options.benchmark)
    num_devices = _num_devices(options, mesh, benchmark)
    speed = _speed(options, benchmark, num_devices, (target, small), seq_len)
    tokens = _tokens(options, params, speed)
    if tokens < seq_len:
        raise UserError(
            f"the budget is {tokens:.3g} tokens, but a sequence has {seq_len}; increase it."
        )
    timing = choose_timing(params, tokens)
    if run is None:
        run = paper_run(
            target,
            nearest_rates(params)[0],
            factor=options.factor,
            small_tokens=timing.tokens,
            tokens=tokens,
            shards=batch_shards(mesh, num_devices),
        )
    workdir = f"runs/{options.write.stem}" if options.write else "runs/plan"
    run = dataclasses.replace(run, mesh=mesh, workdir=workdir)
    return make_plan(
        run,
        factor=options.factor,
        params=params,
        tokens=tokens,
        model=name,
        timing=timing,
        speed=speed,
        num_devices=num_devices,
    )


def _check_options(options: PlanConfig) -> None:
    _check_one(options, ("params", "config"))
    _check_one(options, ("tokens", "flops", "device_hours"))
    if options.tokens_per_second is not None:
        _check_one(options, ("tokens_per_second", "benchmark"))
    if (path := options.write) is None:
        return
    if path.suffix != ".py" or path.exists() or not path.absolute().parent.is_dir():
        raise UserError(
            f"--write is {path}; it must be a new file, named *.py, in an existing directory."
        )


def _check_one(options: PlanConfig, names: tuple[str, ...]) -> None:
    """Raises UserError unless exactly one option has a value."""
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    if sum(getattr(options, name) is not None for name in names) != 1:
        said = " and ".join(f"{flags[name]} is {getattr(options, name)}" for name in names)
        raise UserError(f"{said}; give exactly one of {', '.join(flags.values())}.")


def _small_model(factor: int, target: ModelConfig) -> ModelConfig:
    depth = target.num_layers
    factors = [each for each in range(2, depth + 1) if depth % each == 0]
    if factor not in factors:
        raise UserError(
            f"--factor is {factor}; it must divide the target's {depth} layers, so take one of "
            f"{factors}."
        )
    return Stack(factor).source_config(target)


def _num_devices(
    options: PlanConfig, mesh: MeshConfig, benchmark: Benchmark | None
) -> int | None:
    if options.devices is not None:
        return options.devices
    if -1 not in (mesh.fsdp, mesh.tensor):
        return max(mesh.replica, 1) * mesh.fsdp * mesh.tensor
    return None if benchmark is None else benchmark.num_devices


def _speed(
    options: PlanConfig,
    benchmark: Benchmark | None,
    num_devices: int | None,
    models: tuple[ModelConfig, ModelConfig],
    seq_len: int,
) -> Speed | None:
    if benchmark is not None:
        return measured_speed(benchmark, *models, seq_len)
    if options.tokens_per_second is None:
        return None
    if num_devices is None:
        raise UserError(
            f"--tokens-per-second is {options.tokens_per_second} over an unknown number of "
            f"devices; add --devices."
        )
    return estimated_speed(options.tokens_per_second / num_devices, *models, seq_len)


def _tokens(options: PlanConfig, params: float, speed: Speed | None) -> float:
    """Returns the budget in tokens from scratch (D)."""
    if options.tokens is not None:
        return options.tokens
    if options.flops is not None:
        return options.flops / (6 * params)
    assert options.device_hours is not None, "checked by _check_options"
    if speed is None:
        raise UserError(
            f"--device-hours is {options.device_hours}, but the target's speed is unknown; add "
            f"--benchmark, or --tokens-per-second and --devices."
        )
    return options.device_hours * 3600 * speed.target
