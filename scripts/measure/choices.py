"""Step times with each execution option changed."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from scripts.measure.machine import check_memory, check_time
from scripts.measure.result import CannotMeasure, NotMeasured, attempt, median
from scripts.measure.step import (
    WARMUP_STEPS,
    Program,
    Step,
    compile_phase,
    least_seconds,
    random_batch,
    run_steps,
)
from stackjax.config import Config
from stackjax.model.attention import choose_kernel
from stackjax.model.module import compute_dtype
from stackjax.model.transformer import all_layers, layers_per_iteration
from stackjax.training.compile import new_state
from stackjax.training.phase import Phase
from stackjax.training.train_state import placed

CHUNKS = (64, 128, 256, 512)
KERNELS = {"cpu": ("xla",), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The step with an execution option changed."""

    median_seconds: float
    temporary_bytes: int
    """Temporary memory on each device."""
    compile_seconds: float


def choices(config: Config, phase: Phase) -> dict[str, tuple[Any, ...]]:
    """Returns the values to try for every execution field."""
    layers, seq_len = phase.model.num_layers, phase.seq_len
    return {
        "attention": KERNELS[jax.default_backend()],
        "remat": ("none", "dots", "lean", "full"),
        "scan_unroll": tuple(unroll for unroll in (1, 2, layers) if unroll <= layers),
        "loss_chunk": (*(size for size in CHUNKS if size < seq_len), seq_len),
    }


def variants(config: Config, phase: Phase) -> dict[str, Phase]:
    """Returns the phase as configured, and with each choice changed alone, by name."""
    model, seq_len = phase.model, phase.seq_len
    # Effective values: numbers above num_layers mean all layers.
    own = {
        "attention": choose_kernel(model, compute_dtype(model), seq_len),
        "scan_unroll": layers_per_iteration(all_layers(model)),
        "loss_chunk": min(model.loss_chunk, seq_len),
    }
    found = {"as configured": phase}
    for field, values in choices(config, phase).items():
        for value in values:
            if value != own.get(field, getattr(model, field)):
                changed = dataclasses.replace(model, **{field: value})
                found[f"{field}={value}"] = dataclasses.replace(phase, model=changed)
    return found


def measure_choices(
    config: Config, phase: Phase, mesh: Mesh, num_steps: int, limit_seconds: float
) -> dict[str, Choice | NotMeasured]:
    """Returns a step's cost with each option changed, by name.

    Variants take turns, so other load on the machine slows all of them equally.
    """
    found = {
        name: attempt(lambda variant=variant: _compile(config, variant, mesh))
        for name, variant in variants(config, phase).items()
    }
    steps = {name: pair[0] for name, pair in found.items() if isinstance(pair, tuple)}
    turns = functools.partial(_take_turns, config, phase, mesh, steps)
    seconds = attempt(lambda: turns(WARMUP_STEPS + num_steps, limit_seconds))

    def choice(name: str, pair: Any) -> Choice | NotMeasured:
        if isinstance(pair, NotMeasured):
            return pair
        return seconds if isinstance(seconds, NotMeasured) else _choice(pair[1], seconds[name])

    return {name: choice(name, pair) for name, pair in found.items()}


def _take_turns(
    config: Config,
    phase: Phase,
    mesh: Mesh,
    steps: Mapping[str, Step],
    num_turns: int,
    limit_seconds: float,
) -> dict[str, list[float]]:
    """Returns how long each step took in each turn, by name."""
    if not steps:  # Then not even the state may fit.
        return {}
    total = len(steps) * num_turns
    check_time(total, least_seconds(config, phase, mesh), limit_seconds)
    state = placed(phase, new_state(config, phase))
    batch = random_batch(config, phase, mesh)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(num_turns):
        for name, step in steps.items():
            spent, state = run_steps(step, state, batch, 1)
            seconds[name].append(spent)
        if turn == 0:
            mean = sum(times[0] for times in seconds.values()) / len(steps)
            check_time(total, mean, limit_seconds)
    return seconds


def _compile(config: Config, phase: Phase, mesh: Mesh) -> tuple[Step, Program]:
    try:
        step, program = compile_phase(config, phase, mesh)
    except (ValueError, NotImplementedError) as error:  # No such kernel on this backend.
        raise CannotMeasure(str(error).splitlines()[0]) from error
    check_memory("a step", program.program_bytes)
    return step, program


def _choice(program: Program, seconds: list[float]) -> Choice:
    return Choice(
        median_seconds=median(seconds[WARMUP_STEPS:]),
        temporary_bytes=program.temporary_bytes,
        compile_seconds=program.compile_seconds,
    )
