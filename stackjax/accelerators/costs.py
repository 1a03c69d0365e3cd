"""Costs of a compiled program on each device: FLOPs, memory traffic and communication."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from stackjax.accelerators.groups import collective_groups
from stackjax.accelerators.hlo import Computation, Instruction, Module
from stackjax.accelerators.loops import Runs, count_runs
from stackjax.accelerators.products import attention_products, product_flops
from stackjax.accelerators.traffic import host_bytes, traffic_bytes

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "send",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind in a program, on one device."""

    kind: str
    is_synchronous: bool
    """Whether the device waits: nothing else runs during the collective."""
    crosses_hosts: bool
    """Whether a group has devices on several hosts."""
    calls: int
    wire_bytes: int
    """Bytes that each device sends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """A program's costs on each device."""

    dot_flops: float
    """FLOPs of matrix products outside of attention kernels."""
    attention_flops: float
    """FLOPs of attention kernels' matrix products, for all queries and keys."""
    computed_attention_flops: float
    """FLOPs that attention kernels compute: mostly the causal half."""
    forward_kernels: int
    """Calls of forward attention kernels."""
    traffic: float
    """Bytes read from and written to memory."""
    elementwise_traffic: float
    """Bytes of operations without matrix products, attention, communication or prefetching."""
    host_bytes: float
    """Bytes copied to and from the host's memory."""
    collectives: tuple[Collective, ...]
    unknown_loops: int
    """Loops without a known number of iterations, counted as one iteration."""

    def wire_bytes(self, *, is_synchronous: bool) -> int:
        """Returns the bytes that each device sends, synchronously or not."""
        return sum(
            each.wire_bytes
            for each in self.collectives
            if each.is_synchronous == is_synchronous
        )


def program_costs(module: Module, num_devices: int, devices_per_host: int) -> Costs:
    """Returns the costs of a compiled program on each device."""
    runs = count_runs(module)
    totals: dict[str, float] = collections.defaultdict(float)
    for computation, instruction, times in _executed(module, runs):
        for name, value in _instruction_costs(module, computation, instruction).items():
            totals[name] += times * value
    return Costs(
        dot_flops=totals["dot_flops"],
        attention_flops=totals["attention_flops"],
        computed_attention_flops=totals["computed_attention_flops"],
        forward_kernels=int(totals["forward_kernels"]),
        traffic=totals["traffic"],
        elementwise_traffic=totals["elementwise_traffic"],
        host_bytes=totals["host_bytes"],
        collectives=tuple(_collectives(module, runs, num_devices, devices_per_host)),
        unknown_loops=runs.unknown_loops,
    )


def _executed(module: Module, runs: Runs) -> Iterator[tuple[Computation, Instruction, int]]:
    for name, times in runs.counts.items():
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            yield computation, instruction, times


def _instruction_costs(
    module: Module, computation: Computation, instruction: Instruction
) -> dict[str, float]:
    """Returns an instruction's FLOPs and memory traffic."""
    attention = attention_products(computation, instruction)
    dots = product_flops(module, computation, instruction)
    costs: dict[str, float] = {"dot_flops": dots, "traffic": 0.0}
    costs["traffic"] = traffic_bytes(module, computation, instruction)
    costs["host_bytes"] = host_bytes(instruction)
    if attention is not None:
        costs["attention_flops"] = attention.flops
        costs["computed_attention_flops"] = attention.computed_flops
        costs["forward_kernels"] = attention.is_forward
    elif not dots and _is_elementwise(module, computation, instruction):
        costs["elementwise_traffic"] = costs["traffic"]
    return costs


def _is_elementwise(module: Module, computation: Computation, instruction: Instruction) -> bool:
    """Returns whether an instruction neither communicates nor moves data in the background."""
    is_background = instruction.opcode.endswith("-start")
    return not is_background and not list(_inside(module, computation, instruction))


def _collectives(
    module: Module, runs: Runs, num_devices: int, devices_per_host: int
) -> Iterator[Collective]:
    found: dict[tuple[str, bool, bool], list[int]] = collections.defaultdict(lambda: [0, 0])
    begun = {name: _channels(module, module.computations[name]) for name in runs.counts}
    for computation, instruction, times in _executed(module, runs):
        for inner, each in _inside(module, computation, instruction):
            if not _begins(instruction) and _channel(each) in begun[computation.name]:
                continue  # counted where it began
            groups = collective_groups(each.attributes, num_devices)
            hosts = [{device // devices_per_host for device in group} for group in groups]
            kind, is_synchronous = _kind(module, instruction, each)
            crosses = any(len(group) > 1 for group in hosts)
            counts = found[kind, is_synchronous, crosses]
            counts[0] += times
            counts[1] += times * _wire_bytes(inner, each, kind, len(groups[0]))
    for (kind, is_synchronous, crosses), (calls, wire) in sorted(found.items()):
        yield Collective(
            kind=kind,
            is_synchronous=is_synchronous,
            crosses_hosts=crosses,
            calls=calls,
            wire_bytes=wire,
        )


def _inside(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """Yields an instruction's collectives: itself, or inside a fusion or asynchronous call."""
    if _base(instruction.opcode) in COLLECTIVES:
        yield computation, instruction
    elif instruction.opcode in ("fusion", "async-start"):
        for called in module.called(instruction):
            for each in called.instructions.values():
                yield from _inside(module, called, each)


def _channels(module: Module, computation: Computation) -> set[str]:
    """Returns the channels of the collectives that begin in fusions of their own.

    A TPU's asynchronous collective has several fusions: one that begins, any number during
    which it continues, and one that ends. Each contains the collective.
    """
    return {
        _channel(each)
        for start in computation.instructions.values()
        if _begins(start)
        for _, each in _inside(module, computation, start)
    }


def _channel(collective: Instruction) -> str:
    match = re.search(r"channel_id=(\d+)", collective.attributes)
    return "" if match is None else match[1]


def _begins(instruction: Instruction) -> bool:
    return instruction.name.startswith("async-collective-start")


def _base(opcode: str) -> str:
    return opcode.removesuffix("-start")


def _kind(module: Module, outer: Instruction, inner: Instruction) -> tuple[str, bool]:
    """Returns a collective's kind, and whether it is synchronous."""
    kind, called = _base(inner.opcode), " ".join(outer.called)
    if kind == "all-reduce" and "all-reduce-scatter" in called:
        kind = "reduce-scatter"  # a TPU's fusion of all-reduce and slice
    is_async = outer.opcode.endswith("-start") or _begins(outer) or "async_collective" in called
    # A GPU's collective can be split in two, and yet be followed by its end at once.
    says_sync = re.search(r'"is_sync":true', inner.attributes) is not None
    return kind, says_sync or not (is_async or inner.opcode in ("send",))


def _wire_bytes(
    computation: Computation, instruction: Instruction, kind: str, group_size: int
) -> int:
    """Returns the bytes that a device sends in a ring or a direct exchange."""
    operands = computation.operands(instruction)
    if kind == "send":
        operands = operands[:1]
    size, others = sum(each.num_bytes for each in operands), group_size - 1
    factor = {
        "all-gather": others,
        "all-reduce": 2 * others / group_size,
        "reduce-scatter": others / group_size,
        "all-to-all": others / group_size,
        "ragged-all-to-all": others / group_size,
        "collective-permute": 1,
        "send": 1,
    }[kind]
    return math.ceil(size * factor)
