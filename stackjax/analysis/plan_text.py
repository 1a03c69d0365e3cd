"""A plan as text."""

import textwrap

from stackjax.analysis.planning import Plan, PlannedStage
from stackjax.analysis.published import Published
from stackjax.model.flops import describe
from stackjax.runtime.numbers import short
from stackjax.runtime.text_table import aligned
from stackjax.sharding.config import mesh_axes
from stackjax.sharding.mesh import mesh_shape
from stackjax.training.expand import expand

_WIDTH = 96
_LABEL = 17
_RULES = {
    "law": "the law of arXiv:2405.15319, log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74",
    "scale-free": "the scale-free rule of 10 to 20 %",
}


def show(plan: Plan) -> str:
    """Returns a plan as text, at most 96 columns wide."""
    costs = [_entry("break-even", _break_even(plan)), _entry("saving", _saving(plan))]
    if plan.speed is not None:
        costs.append(_entry("time", _time(plan)))
    if plan.num_devices is not None:
        costs.append(_entry("memory", _memory(plan)))
    blocks = [
        [_entry("budget", _budget(plan)), _entry("target", _target(plan))]
        + [_entry("growth", _growth(plan)), _entry("timing", timing_text(plan))]
        + [_entry(_label(plan, warning), warning) for warning in plan.warnings],
        [_table(plan)],
        costs,
        [
            "Other advice:",
            *(_entry(each.source, each.text) for each in plan.advice),
        ],
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def _budget(plan: Plan) -> str:
    return (
        f"N = {short(plan.params)} parameters, D = {short(plan.tokens)} tokens, "
        f"C = 6 N D = {plan.flops:.2e} FLOPs"
    )


def _target(plan: Plan) -> str:
    text = f"{plan.model}: {describe(expand(plan.config)[-1].model)}"
    cost = plan.scratch.flops_6nd
    if abs(cost / plan.flops - 1) < 0.01:
        return text
    return (
        f"{text}; {short(plan.scratch.params)} parameters in all, so D tokens cost {cost:.2e} "
        f"FLOPs"
    )


def _growth(plan: Plan) -> str:
    small, target = (short(each.non_embedding_params) for each in plan.stages)
    g = plan.factor
    return f"stack({g}): non-embedding parameters {small} -> {target} (g = {g})"


def timing_text(plan: Plan) -> str:
    """Returns the growth timing and the rule."""
    tokens = plan.timing.tokens
    return (
        f"d = {short(tokens)} tokens, {100 * tokens / plan.tokens:.3g} % of D, by "
        f"{_RULES[plan.timing.rule]}"
    )


def _label(plan: Plan, warning: str) -> str:
    return "refused" if warning == plan.timing.refused else "warning"


def _break_even(plan: Plan) -> str:
    speedup, tokens = plan.break_even.speedup, short(plan.break_even.tokens)
    return (
        f"the small model costs as much as {tokens} tokens of the target; growing pays if the "
        f"target's stage saves more tokens to reach scratch's loss, a speed-up of "
        f"{100 * speedup:.3g} %"
    )


def _saving(plan: Plan) -> str:
    (low, high), (least, most) = plan.saving.fewer_flops, plan.saving.flops_6nd
    published = plan.saving.published
    groups = [
        _speedups([each for each in published if each.name == name])
        for name in dict.fromkeys(each.name for each in published)
    ]
    return (
        f"{100 * low:.0f} to {100 * high:.0f} % fewer FLOPs (6ND) to scratch's loss, "
        f"{least:.2e} to {most:.2e}, if the speed-ups of arXiv:2405.15319 apply, without "
        f"guarantee. Speed-ups at the nearest size and at the nearest D/N: "
        f"{'; '.join(groups)}. Here D/N is {short(plan.tokens / plan.params)}."
    )


def _speedups(rows: list[Published]) -> str:
    """Returns the speed-ups at a published size, in words."""
    speedups = ", ".join(f"{100 * each.speedup:.1f}" for each in rows)
    places = ", ".join(dict.fromkeys(each.where for each in rows))
    tokens, lengths = (
        " to ".join(dict.fromkeys([show(min(values)), show(max(values))]))
        for values, show in (
            ([each.tokens for each in rows], short),
            ([each.tokens / each.params for each in rows], short),
        )
    )
    return f"{speedups} % for {rows[0].name} at {tokens} tokens, D/N {lengths} ({places})"


def _time(plan: Plan) -> str:
    speed, saved, scratch = plan.speed, plan.saving.device_hours, plan.scratch.device_hours
    assert speed is not None and saved is not None and scratch is not None
    low, high = saved
    text = f"{short(low)} to {short(high)} device-hours fewer than scratch to equal loss"
    if plan.num_devices is not None:
        days = [short(hours / plan.num_devices / 24) for hours in (low, high, scratch)]
        text += f": {days[0]} to {days[1]} of its {days[2]} days on {_devices(plan)}"
    if speed.small_is_estimate:
        text += (
            ". The small model's speed is an estimate from FLOPs per token; small models are "
            "often slower"
        )
    return text


def _memory(plan: Plan) -> str:
    assert plan.num_devices is not None
    axes = mesh_axes(plan.config.mesh)
    shape = mesh_shape(plan.config.mesh, plan.num_devices)
    sizes = ", ".join(f"{axis} {n}" for axis, n in zip(axes, shape, strict=True))
    return (
        f"parameters, optimizer state and gradients, on {_devices(plan)} ({sizes}); "
        f"not included: activations, and a second copy of the gradients with accumulation"
    )


def _devices(plan: Plan) -> str:
    return f"{plan.num_devices} device{'' if plan.num_devices == 1 else 's'}"


def _table(plan: Plan) -> str:
    names = ("0", "1", "total", "scratch")
    stages = dict(zip(names, (*plan.stages, plan.total, plan.scratch), strict=True))
    columns = [
        ["stage", *stages],
        ["layers", *(str(each.num_layers) for each in stages.values())],
        ["params", *(short(each.params) for each in stages.values())],
        ["tokens", *(short(each.tokens) for each in stages.values())],
        ["6ND FLOPs", *(f"{each.flops_6nd:.2e}" for each in stages.values())],
        ["of scratch", *(f"{100 * _share(plan, each):.2f} %" for each in stages.values())],
        ["matmul FLOPs", *(f"{each.flops:.2e}" for each in stages.values())],
    ]
    if plan.speed is not None:
        hours = [each.device_hours or 0 for each in stages.values()]
        columns.append(["device-hours", *map(short, hours)])
    if plan.num_devices is not None:
        held = [each.memory_bytes for each in stages.values()]
        columns.append(["GiB/device", *(short(n / 2**30) if n else "" for n in held)])
    return aligned(list(zip(*columns, strict=True)), ">")


def _share(plan: Plan, stage: PlannedStage) -> float:
    return stage.flops_6nd / plan.scratch.flops_6nd


def _entry(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
        break_long_words=False,
    )
