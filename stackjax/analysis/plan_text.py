"""A plan as what a person reads, and as the config file of its run."""

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from stackjax.analysis.planning import Plan, PlannedStage
from stackjax.analysis.published import Published
from stackjax.config import Config
from stackjax.growth import Growth
from stackjax.model.flops import describe
from stackjax.runtime.numbers import short
from stackjax.runtime.text_table import aligned
from stackjax.sharding.config import MESH_AXES
from stackjax.sharding.mesh import mesh_shape
from stackjax.training.expand import expand

_WIDTH = 96
_LABEL = 17
_INDENT = 4
_ONE_LINE = 50
"""Characters of arguments that stand on the line of their call."""
_RULES = {
    "law": "the law of arXiv:2405.15319, log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74",
    "scale-free": "the scale-free rule of 10 to 20 %",
}


def show(plan: Plan) -> str:
    """Returns a plan as text, in lines of up to 96 columns."""
    costs = [_entry("break-even", _break_even(plan)), _entry("saving", _saving(plan))]
    if plan.speed is not None:
        costs.append(_entry("time", _time(plan)))
    if plan.num_devices is not None:
        costs.append(_entry("memory", _memory(plan)))
    blocks = [
        [_entry("budget", _budget(plan)), _entry("target", _target(plan))]
        + [_entry("growth", _growth(plan)), _entry("timing", _timing(plan))]
        + [_entry(_label(plan, warning), warning) for warning in plan.warnings],
        [_table(plan)],
        costs,
        [
            "Others would do otherwise:",
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
        f"{text}; of {short(plan.scratch.params)} parameters in all, so that D costs it "
        f"{cost:.2e} FLOPs"
    )


def _growth(plan: Plan) -> str:
    small, target = (short(each.non_embedding_params) for each in plan.stages)
    g = plan.factor
    return f"stack({g}): non-embedding parameters {small} -> {target} (g = {g})"


def _timing(plan: Plan) -> str:
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
        f"the small model costs what {tokens} tokens of the target do; it pays once the "
        f"target's stage reaches scratch's loss that much sooner, a speed-up of "
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
        f"{100 * low:.0f} to {100 * high:.0f} % fewer FLOPs (6ND) until scratch's loss, "
        f"{least:.2e} to {most:.2e}, if it goes as in arXiv:2405.15319, which nothing "
        f"promises. Its speed-ups at the nearest size and at the nearest D/N: "
        f"{'; '.join(groups)}. Here D/N is {short(plan.tokens / plan.params)}."
    )


def _speedups(rows: list[Published]) -> str:
    """Returns the speed-ups of one published size, in words."""
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
    text = f"{short(low)} to {short(high)} device-hours less than scratch to the same loss"
    if plan.num_devices is not None:
        days = [short(hours / plan.num_devices / 24) for hours in (low, high, scratch)]
        text += f": {days[0]} to {days[1]} of its {days[2]} days on {_devices(plan)}"
    if speed.small_is_estimate:
        text += (
            ". The small model's speed is an estimate, by FLOPs a token; small models are "
            "often slower than that"
        )
    return text


def _memory(plan: Plan) -> str:
    assert plan.num_devices is not None
    shape = mesh_shape(plan.config.mesh, plan.num_devices)
    sizes = ", ".join(f"{axis} {n}" for axis, n in zip(MESH_AXES, shape, strict=True))
    return (
        f"parameters, optimizer state and gradients, on {_devices(plan)} ({sizes}); "
        f"activations come on top, and gradients once more where microbatches accumulate"
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


def config_text(plan: Plan, command: str, comments: Mapping[str, str]) -> str:
    """Returns the source of the config file of a plan, laid out as `ruff format` does it.

    Args:
      command: What is writing it.
      comments: What to say of fields, by the names that the command line gives them.
    """
    small, target = plan.stages
    says = [
        f"G_stack (arXiv:2405.15319): {small.num_layers} layers for {short(small.tokens)} "
        f"tokens, then {target.num_layers} for {short(target.tokens)}.",
        f"{_timing(plan)}.",
        *plan.warnings,
    ]
    paragraphs = "\n\n".join(textwrap.fill(each, _WIDTH - 3) for each in says)
    docstring = paragraphs.replace("\\", r"\\").replace('"', r"\"")
    lines = [
        f'"""{docstring}\n"""',
        "",
        f"# Written by: {_printable(command)}",
        "",
        *_imports(plan.config),
        "",
        "",
        "def get_config() -> Config:",
        '    """Returns the run."""',
        f"    return {_source(plan.config, '', comments, _INDENT)}",
    ]
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    """Returns a text on one line, with escapes for what would break it."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _imports(config: Config) -> list[str]:
    """Returns the lines that import the classes of a config's values."""
    names: dict[str, set[str]] = {}
    for kind in _classes(config):
        # Packages export what their modules define.
        module = ".".join(kind.__module__.split(".")[:2])
        names.setdefault(module, set()).add(kind.__name__)
    lines = []
    for module in sorted(names):
        line = f"from {module} import {', '.join(sorted(names[module]))}"
        if len(line) > _WIDTH:
            wrapped = "".join(f"    {name},\n" for name in sorted(names[module]))
            line = f"from {module} import (\n{wrapped})"
        lines.append(line)
    return lines


def _classes(value: Any) -> set[type]:
    """Returns the classes that the source of a value names."""
    if isinstance(value, tuple):
        return {kind for item in value for kind in _classes(item)}
    if not dataclasses.is_dataclass(value):
        return set()
    return {type(value), *(kind for item in _stated(value).values() for kind in _classes(item))}


def _stated(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that are not the default, and all of a growth."""
    fields = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
    whole = isinstance(value, Growth)
    return {
        field.name: item for field, item in fields.items() if whole or item != field.default
    }


def _source(value: Any, path: str, comments: Mapping[str, str], indent: int) -> str:
    """Returns the source of a value that starts on a line indented by so many blanks."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # the escapes of Python, in its quotes
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, tuple):
        name, items = "", {str(i): item for i, item in enumerate(value)}
    elif dataclasses.is_dataclass(value):
        name, items = type(value).__name__, _stated(value)
    else:
        return repr(value)
    inner, parts = indent + _INDENT, []
    for field, item in items.items():
        inside = f"{path}.{field}" if path else field
        comment = f"# {comments[inside]}\n{' ' * inner}" if inside in comments else ""
        keyword = f"{field}=" if name else ""
        parts.append(f"{comment}{keyword}{_source(item, inside, comments, inner)}")
    joined = ", ".join(parts)
    if name and len(joined) <= _ONE_LINE and "\n" not in joined:
        return f"{name}({joined})"
    lines = "".join(f"{' ' * inner}{part},\n" for part in parts)
    return f"{name}(\n{lines}{' ' * indent})"
