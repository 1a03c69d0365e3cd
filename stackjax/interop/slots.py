"""Tensors in a Hugging Face folder, and the parameters in them.

The mapping follows from a parameter's name and axes. Transformers stores each layer apart, and
matrices as [outputs, inputs]. A tensor can hold several parameters, such as queries, keys and
values, and a parameter can be in two tensors, such as a SwiGLU's gate and value.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stackjax import model
from stackjax.interop.families import FAMILIES, Family
from stackjax.interop.tensors import DTYPES, TensorInfo, check_finite
from stackjax.model import ModelConfig
from stackjax.model.config import axis_size
from stackjax.sharding.axes import Axes

_TABLES = (("vocab",), ("positions",))
"""Inputs of embedding tables, which have a row for each input."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor in a folder and the part of a parameter stored there."""

    kind: str
    """Parameter name, the same in every layer."""
    tensor: str
    """Tensor name, without the layer number."""
    layer: int | None
    """Layer, from 0; None for parameters outside the layers."""
    half: int | None
    """0 for the SwiGLU gate, 1 for up, in tensors of their own; None for other parameters."""
    axes: Axes
    """Logical axes without `layers`, and without `gate_up` for a SwiGLU half."""
    family: Family
    outputs: tuple[tuple[str, ...], ...] = ()
    """Output axes of each parameter in a tensor with several, in order."""
    index: int = 0
    """Place among these parameters."""

    @property
    def name(self) -> str:
        """Tensor name in the folder."""
        if self.layer is None:
            return self.tensor
        return f"{self.family.layers}.{self.layer}.{self.tensor}"

    @property
    def place(self) -> dict[str, int]:
        """Index into the parameter axes missing from the tensor."""
        at = {"layers": self.layer, "gate_up": self.half}
        return {name: i for name, i in at.items() if i is not None}

    def in_layer(self, layer: int) -> "Slot":
        """Returns the same tensor in another layer."""
        return dataclasses.replace(self, layer=layer)

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the tensor's shape."""
        shape = [math.prod(_axis_sizes(config, side)) for side in self._sides if side]
        if self.outputs:
            shape[self._output_side] = sum(self._widths(config))
        return tuple(shape)

    def cut(self, parameter: np.ndarray, axes: Any) -> np.ndarray:
        """Returns the tensor's part of a whole parameter, before any transpose.

        Args:
          axes: `Axes` for every parameter.
        """
        names = axes[self.kind] if self.layer is None else axes["layers"][self.kind]
        return parameter[tuple(self.place.get(name, slice(None)) for name in names.names)]

    def from_tensor(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns a stored tensor as part of a parameter, with an unpadded vocabulary."""
        if self.outputs:
            tensor = self._taken(tensor, config)
        first, second = self._sides
        value = tensor.reshape(*_axis_sizes(config, first), *_axis_sizes(config, second))
        return value.transpose([(first + second).index(name) for name in self.axes.names])

    def to_tensor(self, value: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns part of a parameter as a tensor, without padding in the vocabulary.

        For a tensor with several parameters, this is an argument of `joined`.
        """
        first, second = self._sides
        place = self.axes.names.index
        if "vocab" in self.axes.names:
            value = np.moveaxis(value, place("vocab"), 0)[: config.vocab_size]
            value = np.moveaxis(value, 0, place("vocab"))
        value = value.transpose([place(name) for name in first + second])
        sides = (value.shape[: len(first)], value.shape[len(first) :])
        return value.reshape([math.prod(sizes) for sizes in sides if sizes])

    def joined(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        """Returns a tensor with several parameters, from the tensor of each."""
        if not self.family.fused_by_head:
            return np.concatenate(parts, axis=self._output_side)
        heads = [part.reshape(config.num_heads, -1, *part.shape[1:]) for part in parts]
        return np.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])

    def _taken(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns this parameter's part of a tensor with several."""
        widths = self._widths(config)
        start, width = sum(widths[: self.index]), widths[self.index]
        if not self.family.fused_by_head:
            return np.moveaxis(
                np.moveaxis(tensor, self._output_side, 0)[start : start + width],
                0,
                self._output_side,
            )
        heads = tensor.reshape(config.num_heads, -1, *tensor.shape[1:])
        start, width = start // config.num_heads, width // config.num_heads
        return heads[:, start : start + width].reshape(-1, *tensor.shape[1:])

    def _widths(self, config: ModelConfig) -> list[int]:
        """Returns the number of outputs of each parameter in the tensor."""
        return [math.prod(_axis_sizes(config, names)) for names in self.outputs]

    @property
    def _sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Logical axes merged into the tensor's first and second axis."""
        inputs, outputs = self.axes.reads, self.axes.fused + self.axes.writes
        return (inputs, outputs) if self._output_side else (outputs, inputs)

    @property
    def _output_side(self) -> int:
        """The tensor's axis with the outputs."""
        inputs = self.axes.reads
        transposed = self.family.transposed and self.layer is not None and bool(inputs)
        return 1 if transposed or inputs in _TABLES else 0


def _axis_sizes(config: ModelConfig, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(
        config.vocab_size if name == "vocab" else axis_size(config, name) for name in names
    )


def slots(config: ModelConfig, model_type: str) -> Iterator[Slot]:
    """Yields every tensor for a model: embedding, layers, final norm, head.

    A tensor with several parameters comes once for each, in their order.
    """
    axes, family = model.logical_axes(config), FAMILIES[model_type]
    outer = {kind: names for kind, names in axes.items() if kind != "layers"}
    names = family.tensor_names
    yield Slot("embedding", names["embedding"][0], None, None, outer.pop("embedding"), family)
    of_layer = {
        kind: dataclasses.replace(axes["layers"][kind], stacked=())
        for kind in names
        if kind in axes["layers"]
    }
    for layer in range(config.num_layers):
        for kind in of_layer:
            yield from _parts(kind, layer, of_layer, family)
    for kind, each in outer.items():
        yield Slot(kind, names[kind][0], None, None, each, family)


def _parts(kind: str, layer: int, axes: Mapping[str, Axes], family: Family) -> Iterator[Slot]:
    """Yields the tensors of a parameter in a layer.

    Args:
      axes: The axes of every parameter in a layer.
    """
    names, own = family.tensor_names, axes[kind]
    tensors = names[kind]
    first, *others = tensors
    if others:
        for half, tensor in enumerate(tensors):
            yield Slot(kind, tensor, layer, half, dataclasses.replace(own, fused=()), family)
        return
    sharing = [other for other in axes if names[other] == tensors]
    slot = Slot(kind, first, layer, None, own, family)
    if len(sharing) > 1:
        outputs = tuple(axes[other].writes for other in sharing)
        slot = dataclasses.replace(slot, outputs=outputs, index=sharing.index(kind))
    yield slot


def slots_by_kind(config: ModelConfig, model_type: str) -> dict[str, list[Slot]]:
    """Returns the tensors of a model's folder, by parameter."""
    found: dict[str, list[Slot]] = {}
    for slot in slots(config, model_type):
        found.setdefault(slot.kind, []).append(slot)
    return found


def slot_groups(config: ModelConfig, model_type: str) -> list[list[Slot]]:
    """Returns the tensors of a model's folder, in groups with all parameters of a tensor.

    A group has a single parameter, unless its tensors have several.
    """
    by_kind = slots_by_kind(config, model_type)
    group_of: dict[tuple[bool, str], str] = {}
    for kind, found in by_kind.items():
        in_layers = found[0].layer is not None
        group_of.setdefault((in_layers, found[0].tensor), kind)

    def key(slot: Slot) -> tuple[bool, str]:
        in_layers = slot.layer is not None
        first = by_kind[slot.kind][0].tensor
        return in_layers, group_of[in_layers, first]

    found = sorted(slots(config, model_type), key=key)
    return [list(group) for _, group in itertools.groupby(found, key)]


def kinds_of(group: Sequence[Slot]) -> list[str]:
    """Returns the parameters in a group of tensors."""
    return list(dict.fromkeys(slot.kind for slot in group))


def to_tensors(
    parameters: Mapping[str, np.ndarray],
    group: Sequence[Slot],
    config: ModelConfig,
    infos: Mapping[str, TensorInfo],
    where: str | None,
) -> Iterator[np.ndarray]:
    """Yields the tensors of a group.

    Args:
      parameters: Each parameter in the group.
      infos: Types of the tensors.
      where: The source of the parameters, for errors; None accepts NaN and infinity.

    Raises:
      UserError: A number is NaN or infinite, possibly only after the cast to float16.
    """
    axes = model.logical_axes(config)
    for name, slots_of in itertools.groupby(group, lambda slot: slot.name):
        held = list(slots_of)
        parts = [slot.to_tensor(slot.cut(parameters[slot.kind], axes), config) for slot in held]
        whole = held[0].joined(parts, config) if held[0].outputs else parts[0]
        with np.errstate(over="ignore"):  # checked below
            tensor = whole.astype(DTYPES[infos[name].dtype])
        if where is not None:
            check_finite(tensor, name, where)
        yield tensor
