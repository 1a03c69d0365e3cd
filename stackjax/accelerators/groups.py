"""Device groups of a collective, in the three notations of compiled programs."""

import math
import re

import numpy as np

_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= |\{))? *\{([^}]*)\}"
)
_TRANSPOSED = re.compile(r"\[([\d,]+)\]T\(([\d,]+)\)")
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_SUB_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


def collective_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Returns the device numbers in each group of a collective.

    Args:
      attributes: The text after the operands.
    """
    if match := _LISTED.search(attributes) or _PAIRS.search(attributes):
        rows = re.findall(r"\{([\d, ]*)\}", match[1])
        return [_numbers(row) for row in rows if row.strip()]
    if match := _MESH.search(attributes):
        return _mesh_groups(match)
    if match := re.search(rf"replica_groups={_IOTA.pattern}", attributes):
        return _iota(match).tolist()
    return [list(range(num_devices))]


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _iota(match: re.Match[str]) -> np.ndarray:
    """Returns `[sizes]<=[shape]T(order)`: a transposed and reshaped range."""
    sizes, shape = _numbers(match[1]), _numbers(match[2])
    order = _numbers(match[3]) if match[3] else list(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(sizes)


def _mesh_groups(match: re.Match[str]) -> list[list[int]]:
    """Returns the groups along mesh axes, or along parts of axes such as `'x':(2)4`."""
    sizes = {name: int(size) for name, size in _AXIS.findall(match[1])}
    parts = {
        name: (int(before or 1), int(part or sizes[name]))
        for name, before, part in _SUB_AXIS.findall(match[3])
    }
    shape, grouped = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        grouped += [len(shape) + 1]
        shape += [before, part, size // (before * part)]
    kept = [axis for axis in range(len(shape)) if axis not in grouped]
    devices = _mesh_devices(match[2], math.prod(shape))
    moved = devices.reshape(shape).transpose(kept + grouped)
    return moved.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()


def _mesh_devices(text: str | None, num_devices: int) -> np.ndarray:
    """Returns the mesh's device numbers, in order."""
    if text is None:
        return np.arange(num_devices)
    if match := _IOTA.search(text):
        return _iota(match)
    if match := _TRANSPOSED.search(text):
        shape, order = _numbers(match[1]), _numbers(match[2])
        return np.arange(num_devices).reshape(shape).transpose(order)
    return np.array(_numbers(text))
