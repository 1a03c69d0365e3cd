"""A grown run's timing, cost and expected saving.

Symbols: N target parameters, D tokens from scratch, C = 6 N D FLOPs, d tokens before growth, g
growth factor.
"""

import dataclasses
import math
from typing import Literal

from stackjax.analysis.budget import for_flops
from stackjax.analysis.published import Advice, Published, nearest_published, other_advice
from stackjax.analysis.throughput import Speed
from stackjax.analysis.timing import GUIDELINE, SCALE_FREE, outside_range
from stackjax.config import Config, Stage
from stackjax.growth import Stack
from stackjax.model import ModelConfig
from stackjax.model.flops import flops_6nd, matmul_flops, num_layer_params, num_params
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.mesh import mesh_shape
from stackjax.training.expand import expand
from stackjax.training.preflight import check
from stackjax.training.stages import stage_models, stage_seq_lens

MAX_SHARE = 0.5
"""Largest accepted d / D."""
SCALE_FREE_SHARE = 0.15
"""d / D if the law is refused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Growth timing and the rule behind d."""

    tokens: float
    """d."""
    rule: Literal["law", "scale-free"]
    law_tokens: float
    """d by log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74."""
    scale_free_tokens: tuple[float, float]
    """Range of d by the rule of 10 to 20 % of D."""
    outside: tuple[str, ...]
    """Warnings for N and C outside the law's fitted range."""
    refused: str | None
    """Why the law is refused, if so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """Cost per stage, or from scratch; tokens are whole steps."""

    name: Literal["small", "target", "total", "scratch"]
    num_layers: int
    params: int
    non_embedding_params: int
    tokens: float
    flops_6nd: float
    flops: float
    """Matrix-product FLOPs."""
    device_hours: float | None
    memory_bytes: int | None = None
    """Parameters, optimizer state and gradients on each device, without activations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """Expected saving to reach scratch's loss, as ranges."""

    published: tuple[Published, ...]
    """Source for the ranges."""
    fewer_flops: tuple[float, float]
    """Relative to scratch's FLOPs (6ND)."""
    flops_6nd: tuple[float, float]
    device_hours: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Gain with the same cost as the small model."""

    speedup: float
    """Required speed-up in the target's stage alone: small-stage FLOPs over target-stage
    FLOPs."""
    tokens: float
    """Target tokens with the same cost as the small stage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned run."""

    params: float
    """N."""
    tokens: float
    """D."""
    flops: float
    """C = 6 N D."""
    factor: int
    """g, for layers and non-embedding parameters."""
    model: str
    """The target's architecture, or config file."""
    timing: Timing
    stages: tuple[PlannedStage, PlannedStage]
    """Small stage and target stage. Together they cost as much as scratch, up to a step."""
    total: PlannedStage
    """Sum of both stages."""
    scratch: PlannedStage
    break_even: BreakEven
    saving: Saving
    warnings: tuple[str, ...]
    """Reasons for doubt."""
    advice: tuple[Advice, ...]
    """Conflicting advice from other publications."""
    speed: Speed | None
    num_devices: int | None
    config: Config


def choose_timing(params: float, tokens: float) -> Timing:
    """Returns the growth timing by the law in arXiv:2405.15319, unless d exceeds D / 2."""
    flops = 6 * params * tokens
    law_tokens, outside = GUIDELINE(params, flops), tuple(outside_range(params, flops))
    refused = None
    if law_tokens > MAX_SHARE * tokens:
        refused = (
            f"the growth-timing law is refused: its d is {law_tokens:.3g} tokens, "
            f"{law_tokens / tokens:.3g} x D, more than {MAX_SHARE:g} x D. The plan takes "
            f"{100 * SCALE_FREE_SHARE:g} % of D instead."
        )
    return Timing(
        tokens=SCALE_FREE_SHARE * tokens if refused else law_tokens,
        rule="scale-free" if refused else "law",
        law_tokens=law_tokens,
        scale_free_tokens=(SCALE_FREE[0] * tokens, SCALE_FREE[1] * tokens),
        outside=outside,
        refused=refused,
    )


def grown_run(template: Config, factor: int, small_tokens: float, tokens: float) -> Config:
    """Returns the stacked run, with equal FLOPs (6ND) as D tokens from scratch.

    Args:
      template: Gives the target (the final model), learning rates and schedules (first and
        last stage), and batches (last stage). Warm-ups longer than a stage are cut.
      small_tokens: d.
      tokens: D.

    Raises:
      UserError: The tokens are too few for two stages, or a stage has a schedule that a plan
        cannot move.
    """
    for index, each in enumerate((template.stages[0], template.stages[-1])):
        if each.batch_steps or each.source_ramp_tokens is not None:
            where = 0 if index == 0 else len(template.stages) - 1
            raise UserError(
                f"stages.{where} has batch_steps or source_ramp_tokens, in tokens of a stage "
                f"whose length a plan changes; leave them out of the template."
            )
    target = stage_models(template)[-1]
    first, last = template.stages[0], template.stages[-1]
    seq_len = stage_seq_lens(template)[-1]
    step_tokens = last.batch_size * seq_len

    def stage(like: Stage, tokens: float) -> Stage:
        length, schedule = math.ceil(tokens / step_tokens) * step_tokens, like.schedule
        if _warmup(template, like) >= length:
            shared = schedule or template.optimizer.schedule
            schedule = dataclasses.replace(shared, warmup_tokens=length // 10)
        return Stage(
            tokens=length,
            batch_size=last.batch_size,
            accumulate=last.accumulate,
            source_weights=like.source_weights,
            rope_theta=like.rope_theta,
            rope_scaling=like.rope_scaling,
            peak_learning_rate=like.peak_learning_rate,
            schedule=schedule,
        )

    small = stage(first, small_tokens)
    grown = dataclasses.replace(stage(last, tokens), growth=Stack(factor))
    config = dataclasses.replace(
        template,
        model=target,
        model_is="target",
        data=dataclasses.replace(template.data, seq_len=seq_len),
        stages=(small, grown),
    )
    return for_flops(config, flops_6nd(target) * tokens)


def batch_shards(mesh: MeshConfig, num_devices: int | None) -> int:
    """Returns the batch shards; 1 if the device count is unknown."""
    return math.prod(mesh_shape(mesh, num_devices)[:2]) * mesh.expert if num_devices else 1


def _warmup(config: Config, stage: Stage) -> int:
    return (stage.schedule or config.optimizer.schedule).warmup_tokens


def make_plan(
    template: Config,
    *,
    factor: int,
    params: float,
    tokens: float,
    model: str,
    timing: Timing,
    speed: Speed | None,
    num_devices: int | None,
) -> Plan:
    """Returns the plan for a `grown_run`.

    Args:
      num_devices: None if unknown; then the memory is unknown, too.

    Raises:
      UserError: The tokens are too few, or a stage does not fit the mesh or the devices.
    """
    config = grown_run(template, factor, timing.tokens, tokens)
    phases = expand(config)
    seq_len = phases[-1].seq_len
    small_rate, rate = (speed.small, speed.target) if speed else (None, None)
    held: list[int | None] = [None, None]
    if num_devices is not None:
        held = [each.state_bytes + each.gradient_bytes for each in check(config, num_devices)]
    lengths = [phase.end.tokens - phase.start.tokens for phase in phases]
    models = [phase.model for phase in phases]
    small = _planned("small", models[0], lengths[0], seq_len, small_rate, held[0])
    target = _planned("target", models[1], lengths[1], seq_len, rate, held[1])
    scratch = _planned("scratch", models[1], tokens, seq_len, rate, None)
    ends = zip((template.stages[0], template.stages[-1]), config.stages, strict=True)
    cut = [
        f"the warm-up of stage {i} is {before:.3g} tokens, no shorter than the stage; cut to "
        f"{after:.3g}."
        for i, (old, new) in enumerate(ends)
        if (before := _warmup(template, old)) != (after := _warmup(config, new))
    ]
    refused = [timing.refused] if timing.refused else []
    return Plan(
        params=params,
        tokens=tokens,
        flops=6 * params * tokens,
        factor=factor,
        model=model,
        timing=timing,
        stages=(small, target),
        total=_both(small, target),
        scratch=scratch,
        break_even=BreakEven(
            speedup=small.flops_6nd / target.flops_6nd,
            tokens=small.flops_6nd / flops_6nd(models[1]),
        ),
        saving=expected_saving(params, tokens, small, scratch),
        warnings=(*refused, *timing.outside, *cut),
        advice=other_advice(factor, timing.tokens, tokens, models[0]),
        speed=speed,
        num_devices=num_devices,
        config=config,
    )


def _planned(
    name: Literal["small", "target", "scratch"],
    model: ModelConfig,
    tokens: float,
    seq_len: int,
    rate: float | None,
    memory_bytes: int | None,
) -> PlannedStage:
    return PlannedStage(
        name=name,
        num_layers=model.num_layers,
        params=num_params(model),
        non_embedding_params=num_layer_params(model),
        tokens=tokens,
        flops_6nd=flops_6nd(model) * tokens,
        flops=matmul_flops(model, seq_len) * tokens,
        device_hours=None if rate is None else tokens / rate / 3600,
        memory_bytes=memory_bytes,
    )


def _both(small: PlannedStage, target: PlannedStage) -> PlannedStage:
    hours = None
    if small.device_hours is not None and target.device_hours is not None:
        hours = small.device_hours + target.device_hours
    return dataclasses.replace(
        target,
        name="total",
        tokens=small.tokens + target.tokens,
        flops_6nd=small.flops_6nd + target.flops_6nd,
        flops=small.flops + target.flops,
        device_hours=hours,
        memory_bytes=None,
    )


def expected_saving(
    params: float, tokens: float, small: PlannedStage, scratch: PlannedStage
) -> Saving:
    """Returns the saving with the nearest published speed-ups."""
    published = nearest_published(params, tokens)
    shares = [each.fewer_flops for each in published]
    low, high = min(shares), max(shares)
    hours = None
    if small.device_hours is not None and scratch.device_hours is not None:
        # The target's stage runs at the speed of scratch.
        at_that_speed = small.flops_6nd / scratch.flops_6nd * scratch.device_hours
        more = small.device_hours - at_that_speed
        hours = low * scratch.device_hours - more, high * scratch.device_hours - more
    return Saving(
        published=published,
        fewer_flops=(low, high),
        flops_6nd=(low * scratch.flops_6nd, high * scratch.flops_6nd),
        device_hours=hours,
    )
