"""Hugging Face folders and their mapping to parameters, for the families in `families.py`.

The mapping follows from a parameter's name and axes. Transformers stores each layer apart,
matrices as [outputs, inputs], and the SwiGLU gate and up projections as two tensors.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stackjax import model
from stackjax.interop.config_json import (
    CONFIG,
    config_fields,
    model_config,
    read_fields,
    read_json,
)
from stackjax.interop.families import norm_names
from stackjax.interop.tensors import DTYPES, TensorInfo, Tensors, check_finite, same_values
from stackjax.model import ModelConfig, Params
from stackjax.model.config import axis_size
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import partition

_TENSORS = {
    "embedding": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attention_norm": (),
    "query": ("self_attn.q_proj.weight",),
    "key": ("self_attn.k_proj.weight",),
    "value": ("self_attn.v_proj.weight",),
    "query_bias": ("self_attn.q_proj.bias",),
    "key_bias": ("self_attn.k_proj.bias",),
    "value_bias": ("self_attn.v_proj.bias",),
    "query_norm": ("self_attn.q_norm.weight",),
    "key_norm": ("self_attn.k_norm.weight",),
    "out": ("self_attn.o_proj.weight",),
    "attention_out_norm": (),
    "mlp_norm": (),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
    "mlp_out_norm": (),
}
"""Tensor names for each parameter, without the layer number; norms have the family's names."""
_HEAD = _TENSORS["head"][0]
_EMBEDDING = _TENSORS["embedding"][0]
_ADAPTER = "adapter_config.json"


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
    """0 for the SwiGLU gate, 1 for up; None for other parameters."""
    axes: Axes
    """Logical axes without `layers`, and without `gate_up` for a SwiGLU half."""

    @property
    def name(self) -> str:
        """Tensor name in the folder."""
        if self.layer is None:
            return self.tensor
        return f"model.layers.{self.layer}.{self.tensor}"

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
        sides = (_axis_sizes(config, side) for side in _sides(self.axes))
        return tuple(math.prod(sizes) for sizes in sides if sizes)

    def cut(self, parameter: np.ndarray, axes: Any) -> np.ndarray:
        """Returns the tensor's part of a whole parameter, before any transpose.

        Args:
          axes: `Axes` for every parameter.
        """
        names = axes[self.kind] if self.layer is None else axes["layers"][self.kind]
        return parameter[tuple(self.place.get(name, slice(None)) for name in names.names)]

    def from_tensor(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns a stored tensor as part of a parameter, with an unpadded vocabulary."""
        first, second = _sides(self.axes)
        value = tensor.reshape(*_axis_sizes(config, first), *_axis_sizes(config, second))
        return value.transpose([(first + second).index(name) for name in self.axes.names])

    def to_tensor(self, value: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns part of a parameter as a tensor, without padding in the vocabulary."""
        first, second = _sides(self.axes)
        place = self.axes.names.index
        if "vocab" in self.axes.names:
            value = np.moveaxis(value, place("vocab"), 0)[: config.vocab_size]
            value = np.moveaxis(value, 0, place("vocab"))
        value = value.transpose([place(name) for name in first + second])
        sides = (value.shape[: len(first)], value.shape[len(first) :])
        return value.reshape([math.prod(sizes) for sizes in sides if sizes])


def _sides(axes: Axes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the logical axes merged into a tensor's first and second axis."""
    # The embedding table is indexed by token, so tokens are rows.
    return (axes.reads, axes.writes) if axes.reads == ("vocab",) else (axes.writes, axes.reads)


def _axis_sizes(config: ModelConfig, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(
        config.vocab_size if name == "vocab" else axis_size(config, name) for name in names
    )


def slots(config: ModelConfig) -> Iterator[Slot]:
    """Yields every tensor for a model: embedding, layers, final norm, head."""
    axes = model.logical_axes(config)
    outer = {kind: names for kind, names in axes.items() if kind != "layers"}
    norms = norm_names(config)
    yield Slot("embedding", _EMBEDDING, None, None, outer.pop("embedding"))
    for layer in range(config.num_layers):
        for kind in _TENSORS:
            if kind in axes["layers"]:
                names = dataclasses.replace(axes["layers"][kind], stacked=())
                tensors = (f"{norms[kind]}.weight",) if kind in norms else _TENSORS[kind]
                yield from _parts(kind, tensors, layer, names)
    for kind, names in outer.items():
        yield Slot(kind, _TENSORS[kind][0], None, None, names)


def slots_by_kind(config: ModelConfig) -> dict[str, list[Slot]]:
    """Returns the tensors of a model's folder, grouped by parameter."""
    kinds = model.logical_axes(config)["layers"]
    found = sorted(slots(config), key=lambda slot: (slot.kind in kinds, slot.kind))
    return {kind: list(group) for kind, group in itertools.groupby(found, lambda s: s.kind)}


def to_tensors(
    parameter: np.ndarray,
    stored: Sequence[Slot],
    config: ModelConfig,
    infos: Mapping[str, TensorInfo],
    where: str | None,
) -> Iterator[np.ndarray]:
    """Yields the tensors of a parameter.

    Args:
      stored: The slots of the parameter.
      infos: Types of the tensors.
      where: The source of the parameter, for errors; None accepts NaN and infinity.

    Raises:
      UserError: A number is NaN or infinite, possibly only after the cast to float16.
    """
    axes = model.logical_axes(config)
    for slot in stored:
        part = slot.to_tensor(slot.cut(parameter, axes), config)
        with np.errstate(over="ignore"):  # checked below
            tensor = part.astype(DTYPES[infos[slot.name].dtype])
        if where is not None:
            check_finite(tensor, slot.name, where)
        yield tensor


def _parts(kind: str, tensors: Sequence[str], layer: int, axes: Axes) -> Iterator[Slot]:
    if not axes.fused:
        yield Slot(kind, tensors[0], layer, None, axes)
        return
    for half, tensor in enumerate(tensors):
        yield Slot(kind, tensor, layer, half, dataclasses.replace(axes, fused=()))


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder with matching config and tensors."""

    path: Path
    name: str
    """Model name."""
    fields: Mapping[str, Any]
    """Parsed config.json."""
    model: ModelConfig
    tensors: Tensors

    def read(self, slot: Slot) -> np.ndarray:
        """Returns part of a parameter, memory-mapped."""
        return slot.from_tensor(self.tensors.read(slot.name), self.model)

    def check_finite(self, slot: Slot) -> None:
        """Raises UserError if a tensor holds NaN or infinity."""
        check_finite(self.tensors.read(slot.name), slot.name, str(self.path))

    @property
    def dtypes(self) -> dict[str, str]:
        """Stored type of every tensor, such as `BF16`."""
        return {slot.name: self.tensors[slot.name].dtype for slot in slots(self.model)}


def is_folder(path: Path) -> bool:
    """Returns whether a path looks like a Hugging Face folder; runs have a config.json too."""
    file = path / CONFIG
    if not file.is_file():
        return any(path.glob("*.safetensors")) or (path / "pytorch_model.bin").exists()
    try:
        fields = read_json(file)
    except UserError:
        return True
    return not isinstance(fields, dict) or "config" not in fields


def read_folder(path: Path) -> Folder:
    """Returns an opened folder.

    Raises:
      UserError: The folder is incomplete or damaged, or has an unsupported model.
    """
    fields = read_fields(path)
    config = model_config(fields, str(path / CONFIG))
    if (path / _ADAPTER).exists():
        raise UserError(
            f"{path} has {_ADAPTER}, and transformers would load the adapter; merge the "
            f"adapter into the weights, or remove this file."
        )
    tensors = Tensors(path)
    config = dataclasses.replace(config, tie_head=_is_tied(config, tensors))
    check_tensors(tensors, config, str(path))
    return Folder(path, path.resolve().name, fields, config, tensors)


def _is_tied(config: ModelConfig, tensors: Tensors) -> bool:
    """Returns whether embedding and head are tied.

    As in transformers, a stored head with different values overrides the config.
    """
    if not config.tie_head or _HEAD not in tensors or _EMBEDDING not in tensors:
        return config.tie_head
    if tensors[_HEAD].shape != tensors[_EMBEDDING].shape:
        return False
    return same_values(tensors.read(_HEAD), tensors.read(_EMBEDDING))


def check_tensors(tensors: Mapping[str, TensorInfo], config: ModelConfig, where: str) -> None:
    """Raises UserError if tensors are missing, have a wrong shape, or are unknown.

    Args:
      where: Folder name for messages.
    """
    expected = set()
    # Stops at the first missing tensor, even if the config claims billions of layers.
    for slot in slots(config):
        name, shape = slot.name, slot.shape(config)
        expected.add(name)
        if name not in tensors:
            raise UserError(f"{where} has no tensor {name}, required by its config.")
        if tensors[name].shape != shape:
            raise UserError(
                f"{name} in {where} has shape {list(tensors[name].shape)}; by the config it "
                f"must be {list(shape)}."
            )
    # Older versions also stored RoPE frequencies and a tied head.
    ignored = ("rotary_emb.inv_freq", *((_HEAD,) if config.tie_head else ()))
    extra = [n for n in tensors if n not in expected and not n.endswith(ignored)]
    if extra:
        raise UserError(
            f"{where} holds {min(extra)} ({len(extra)} such tensors), unknown to stackjax; "
            f"remove the tensors, or use another model."
        )


def grown_fields(folder: Folder, target: ModelConfig) -> dict[str, Any]:
    """Returns a grown model's config.json; raises as `config_fields`."""
    return config_fields(target, None, folder.fields, seq_len=0)


def load_params(
    folder: Folder, config: ModelConfig, mesh: Mesh, *, allow_nonfinite: bool = False
) -> Params:
    """Returns a folder's parameters in float32, sharded over the mesh.

    Every process reads only the shards on its devices.

    Args:
      config: The folder's model, possibly with a padded vocabulary.
      allow_nonfinite: Accept NaN and infinity.

    Raises:
      UserError: A parameter is NaN or infinite, or too large for float32.
    """

    return load_part(
        folder,
        config,
        model.logical_axes(config),
        mesh,
        np.dtype(np.float32),
        allow_nonfinite=allow_nonfinite,
    )


def load_part(
    folder: Folder,
    config: ModelConfig,
    axes: Any,
    mesh: Mesh,
    dtype: np.dtype,
    *,
    allow_nonfinite: bool,
) -> Params:
    """Returns a part of the parameters in `load_params`.

    Args:
      axes: The `Axes` of each parameter in the part.
      dtype: Type of the parameters.
    """

    def load(path: Any, names: Axes) -> jax.Array:
        shape = tuple(axis_size(config, name) for name in names.names)
        sharding = NamedSharding(mesh, partition(names) or jax.sharding.PartitionSpec())
        stored = slots_by_kind(folder.model)[path[-1].key]
        read = _reader(folder, stored, names, shape, dtype, allow_nonfinite)
        return jax.make_array_from_callback(shape, sharding, read)

    return jax.tree_util.tree_map_with_path(load, axes)


def _reader(
    folder: Folder,
    stored: list[Slot],
    names: Axes,
    shape: tuple[int, ...],
    dtype: np.dtype,
    allow_nonfinite: bool,
) -> Callable[[Any], np.ndarray]:
    """Returns a function from a parameter's index (a slice per axis) to values."""

    def read(index: Any) -> np.ndarray:
        ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        wanted = dict(zip(names.names, ranges, strict=True))
        # Vocabulary padding is zero.
        values = np.zeros([len(indices) for indices in ranges], dtype)
        for slot in stored:
            if all(i in wanted[name] for name, i in slot.place.items()):
                held = folder.read(slot)[
                    tuple(slice(wanted[n].start, wanted[n].stop) for n in slot.axes.names)
                ]
                corner = dict(zip(slot.axes.names, map(slice, held.shape), strict=True))
                corner |= {name: i - wanted[name].start for name, i in slot.place.items()}
                target = values[tuple(corner[name] for name in names.names)]
                with np.errstate(over="ignore"):  # from float64; checked below
                    target[...] = held
                if not allow_nonfinite:
                    check_finite(target, slot.name, str(folder.path))
        return values

    return read
