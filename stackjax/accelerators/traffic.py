"""Memory traffic of instructions: bytes read and written."""

from collections.abc import Iterable

from stackjax.accelerators.hlo import Computation, Instruction, Module, Shape

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "call", "conditional", "opt-barrier", "optimization-barrier"),
    *("partition-id", "replica-id", "iota", "copy-done", "async-done", "async-update"),
}
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
"""A TPU's memory for a result that other instructions write."""
_SAME = ("bitcast", "reshape", "convert", "copy")


def traffic_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes that an instruction reads from and writes to memory.

    A fusion reads its operands once, and writes its result once. Slices count with the slice's
    size, and updates in place with the update's size. Arrays in on-chip memory do not count.
    """
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0.0
    if _ALLOCATION in instruction.attributes:
        return 0.0
    if instruction.opcode == "fusion":
        return _fusion_bytes(computation, instruction, module.called(instruction)[0])
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _bytes([instruction])
    operands = computation.operands(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * _bytes(operands[1:2])
    if instruction.opcode == "copy-start":  # to or from on-chip memory
        return _bytes(operands) + _written(instruction.shapes[:1])
    if instruction.opcode.endswith("-start"):
        return 2.0 * _bytes(operands)
    return _bytes([instruction, *operands])


def host_bytes(instruction: Instruction) -> int:
    """Returns the bytes that an instruction copies to or from the host's memory."""
    if instruction.opcode != "copy-start":
        return 0
    target, source = instruction.shapes[:2]
    return target.num_bytes if target.in_host_memory or source.in_host_memory else 0


def _bytes(instructions: Iterable[Instruction]) -> float:
    return sum(_written(each.shapes) for each in instructions)


def _written(shapes: Iterable[Shape]) -> float:
    return sum(shape.num_bytes for shape in shapes if shape.in_main_memory)


def _fusion_bytes(computation: Computation, fusion: Instruction, fused: Computation) -> float:
    parameters = [each for each in fused.instructions.values() if each.opcode == "parameter"]
    read = 0.0
    for parameter in parameters:
        number = int(parameter.arguments)
        outer = computation.instructions[fusion.operands[number]]
        if _bytes([outer]):
            read += min(_bytes([outer]), _read_bytes(fused, parameter))
    return read + _written_bytes(fusion, fused)


def _read_bytes(fused: Computation, parameter: Instruction) -> float:
    """Returns the bytes of a parameter that a fusion reads."""
    total = 0.0
    for user in _users(fused, parameter):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.num_bytes
        elif user.opcode != "dynamic-update-slice" or not _is_target(fused, user, parameter):
            return parameter.num_bytes
    return total


def _users(fused: Computation, read: Instruction) -> Iterable[Instruction]:
    """Yields the instructions that read a result, also through changes of shape or type."""
    for each in fused.instructions.values():
        if read.name in each.operands:
            if each.opcode in _SAME and not each.is_root:
                yield from _users(fused, each)
            else:
                yield each


def _is_target(fused: Computation, update: Instruction, parameter: Instruction) -> bool:
    """Returns whether an update in place changes a parameter."""
    target = fused.instructions[update.operands[0]]
    while target.opcode in _SAME:
        target = fused.instructions[target.operands[0]]
    return target.name == parameter.name


def _written_bytes(fusion: Instruction, fused: Computation) -> float:
    """Returns the bytes that a fusion writes; updates in place write the update alone."""
    root = fused.root
    results = fused.operands(root) if root.opcode == "tuple" else [root]
    total = 0.0
    for shape, result in zip(fusion.shapes, results, strict=False):
        while result.opcode in _SAME:
            result = fused.operands(result)[0]
        if not shape.in_main_memory:
            continue
        if result.opcode == "dynamic-update-slice":
            total += fused.operands(result)[1].num_bytes
        else:
            total += shape.num_bytes
    return total
