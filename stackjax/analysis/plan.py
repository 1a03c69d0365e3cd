"""A plan from the options of the command: budget, model, mesh, timing."""

import dataclasses
import json
import math
import shlex
import sys
from typing import Any

from stackjax.analysis.architectures import SEQ_LEN, choose_model, nearest_rates, paper_run
from stackjax.analysis.plan_text import config_text, show
from stackjax.analysis.planning import Plan, choose_timing, make_plan
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
from stackjax.sharding.config import MESH_AXES, MeshConfig
from stackjax.sharding.mesh import mesh_shape
from stackjax.training.stages import stage_models


def report(found: Plan) -> dict[str, Any]:
    """Returns all of a plan, for machines; what is not known is null."""
    return dataclasses.asdict(found) | {"config": flatten(found.config)}


def _comments(options: PlanConfig) -> dict[str, str]:
    """Returns what a config file says of rates that are the plan's own."""
    if options.params is None:
        return {}
    size = nearest_rates(options.params).name
    return {
        "optimizer.peak_learning_rate": f"That of {size} in the paper; to be tuned.",
        "stages.0.peak_learning_rate": f"That of {size} in configs/; to be tuned.",
    }


def plan(options: PlanConfig) -> Plan:
    """Returns the plan that a command line asks for.

    Raises:
      UserError: The options contradict each other, or the run that they ask for cannot be.
    """
    _check_options(options)
    if options.config is not None:
        run = read_config(options.config)
        target, name, seq_len = stage_models(run)[-1], str(options.config), run.data.seq_len
        params, mesh = float(num_params(target)), run.stages[-1].mesh or run.mesh
    else:
        assert options.params is not None, "_check_options asks for one of the two"
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
            f"the budget is {tokens:.3g} tokens, which is less than a sequence of {seq_len}; "
            f"give it more."
        )
    timing = choose_timing(params, tokens)
    if run is None:
        run = paper_run(
            target,
            nearest_rates(params),
            factor=options.factor,
            small_tokens=timing.tokens,
            tokens=tokens,
            shards=math.prod(mesh_shape(mesh, num_devices)[:2]) if num_devices else 1,
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
    if (options.params is None) == (options.config is None):
        raise UserError(
            f"--params is {options.params} and --config is {options.config}; give one of the "
            f"two."
        )
    numbers = {
        "--tokens": options.tokens,
        "--flops": options.flops,
        "--device-hours": options.device_hours,
    }
    budgets = ("--tokens", "--flops", "--device-hours")
    given = [f"{name} is {numbers[name]}" for name in budgets if numbers[name] is not None]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given) or 'there is no budget'}; give exactly one of "
            f"{', '.join(budgets)}."
        )
    if options.tokens_per_second is not None and options.benchmark is not None:
        raise UserError(
            f"--tokens-per-second is {options.tokens_per_second} and --benchmark is "
            f"{options.benchmark}; give one of the two."
        )
    if (path := options.write) is None:
        return
    if path.suffix != ".py" or path.exists() or not path.absolute().parent.is_dir():
        raise UserError(
            f"--write is {path}; it must be a new file, named *.py, in a directory that exists."
        )


def _small_model(factor: int, target: ModelConfig) -> ModelConfig:
    depth = target.num_layers
    factors = [each for each in range(2, depth + 1) if depth % each == 0]
    if factor not in factors:
        raise UserError(
            f"--factor is {factor}; it must be more than 1 and divide the {depth} layers of "
            f"the target, so take one of {factors}."
        )
    return Stack(factor).source_config(target)


def _num_devices(
    options: PlanConfig, mesh: MeshConfig, benchmark: Benchmark | None
) -> int | None:
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    if options.devices is not None:
        return options.devices
    if -1 not in sizes:
        return math.prod(sizes)
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
            f"--tokens-per-second is {options.tokens_per_second}, over all devices; say with "
            f"--devices how many those are."
        )
    return estimated_speed(options.tokens_per_second / num_devices, *models, seq_len)


def _tokens(options: PlanConfig, params: float, speed: Speed | None) -> float:
    """Returns the tokens of a run from scratch that a budget pays for (D)."""
    if options.tokens is not None:
        return options.tokens
    if options.flops is not None:
        return options.flops / (6 * params)
    assert options.device_hours is not None, "_check_options asks for one of the three"
    if speed is None:
        raise UserError(
            f"--device-hours is {options.device_hours}, and nothing says how fast the target "
            f"trains; give --benchmark, or --tokens-per-second and --devices."
        )
    return options.device_hours * 3600 * speed.target


def write(options: PlanConfig) -> None:
    """Prints a plan and writes the requested config file; raises as `plan` does."""
    found = plan(options)
    if options.write is not None:
        command = f"{program('plan')} {shlex.join(sys.argv[1:])}"
        text = config_text(found, command, _comments(options))
        with options.write.open("x", encoding="utf-8") as file:
            file.write(text)
    if options.json:
        print(json.dumps(report(found), indent=1))
        return
    print(show(found))
    if options.write is not None:
        print(f"\n{program('train')} --config {shlex.quote(str(options.write))}")
