"""Iterations of the loops in a compiled program, and how often each computation runs."""

import collections
import dataclasses

from stackjax.accelerators.hlo import Computation, Instruction, Module

_MOVES = ("copy", "bitcast", "reshape", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Runs:
    """How often each computation of a program runs."""

    counts: dict[str, int]
    """By computation; computations inside of fusions are left out."""
    unknown_loops: int
    """Loops with an unknown number of iterations, counted as one iteration."""


def count_runs(module: Module) -> Runs:
    """Returns how often each computation runs, with loops multiplied out."""
    counts: dict[str, int] = collections.defaultdict(int)
    unknown: set[str] = set()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        computation = module.computations[name]
        for each in computation.instructions.values():
            if each.opcode not in ("while", "call", "conditional"):
                continue
            trips = 1
            if each.opcode == "while":
                known = loop_iterations(module, computation, each)
                trips = 1 if known is None else known
                unknown.update([each.name] if known is None else [])
            for called in each.called:
                visit(called, times * trips)

    visit(module.entry, 1)
    return Runs(dict(counts), len(unknown))


def loop_iterations(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Returns the iterations of a `while` instruction; None if unknown.

    Some compilers state the number. Otherwise the result follows from a counter: first value,
    last value and step.

    Args:
      caller: The computation with the loop.
    """
    if loop.trips is not None:
        return loop.trips
    condition, body = (
        module.computations[loop.called_as(role)] for role in ("condition", "body")
    )
    compared = _compared(condition)
    if compared is None:
        return None
    index, end = compared
    first = _first_value(caller, loop, index)
    step = _step(module, body, index)
    if first is None or not step:
        return None
    return max(0, -(-(end - first) // step))


def _compared(condition: Computation) -> tuple[int, int] | None:
    """Returns the counter's position in the loop's state, and its exclusive end."""
    root = condition.root
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, end = condition.operands(root)
    limit = _constant(condition, end)
    if counter.opcode != "get-tuple-element" or limit is None:
        return None
    return counter.index, limit


def _first_value(caller: Computation, loop: Instruction, index: int) -> int | None:
    (state,) = caller.operands(loop)
    if state.opcode != "tuple":
        return None
    return _constant(caller, caller.operands(state)[index])


def _step(module: Module, body: Computation, index: int) -> int | None:
    """Returns the constant that a loop's body adds to the counter."""
    if body.root.opcode != "tuple":
        return None
    update = _source(body, body.operands(body.root)[index])
    scope = body
    if update.opcode == "fusion":
        (scope,) = module.called(update)
        update = _source(scope, scope.root)
    if update.opcode != "add":
        return None
    constants = [_constant(scope, each) for each in scope.operands(update)]
    known = [value for value in constants if value is not None]
    return known[0] if len(known) == 1 else None


def _constant(scope: Computation, instruction: Instruction) -> int | None:
    source = _source(scope, instruction)
    is_integer = source.opcode == "constant" and source.arguments.lstrip("-").isdigit()
    return int(source.arguments) if is_integer else None


def _source(scope: Computation, instruction: Instruction) -> Instruction:
    """Returns the instruction that makes a value, before copies and changes of shape."""
    while instruction.opcode in _MOVES:
        instruction = scope.operands(instruction)[0]
    return instruction
