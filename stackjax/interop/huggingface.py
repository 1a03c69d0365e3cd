"""Hugging Face folders, for the families in `families.py`."""

import dataclasses
from collections.abc import Callable, Mapping
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
from stackjax.interop.families import FAMILIES, Family
from stackjax.interop.slots import Slot, slots, slots_by_kind
from stackjax.interop.tensors import TensorInfo, Tensors, check_finite, same_values
from stackjax.model import ModelConfig, Params
from stackjax.model.config import shape_of
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import partition

_ADAPTER = "adapter_config.json"


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
    def model_type(self) -> str:
        """The family's name."""
        return self.fields["model_type"]

    @property
    def dtypes(self) -> dict[str, str]:
        """Stored type of every tensor, such as `BF16`."""
        found = slots(self.model, self.model_type)
        return {slot.name: self.tensors[slot.name].dtype for slot in found}


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
    kind = fields["model_type"]
    family = FAMILIES[kind]
    tensors = Tensors(path, family.renamed, family.ignored)
    config = dataclasses.replace(config, tie_head=_is_tied(config, tensors, family))
    check_tensors(tensors, config, kind, str(path))
    return Folder(path, path.resolve().name, fields, config, tensors)


def _is_tied(config: ModelConfig, tensors: Tensors, family: Family) -> bool:
    """Returns whether embedding and head are tied.

    As in transformers, a stored head with different values overrides the config.
    """
    head, embedding = family.tensor("head"), family.tensor("embedding")
    if not config.tie_head or head not in tensors or embedding not in tensors:
        return config.tie_head
    if tensors[head].shape != tensors[embedding].shape:
        return False
    return same_values(tensors.read(head), tensors.read(embedding))


def check_tensors(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, model_type: str, where: str
) -> None:
    """Raises UserError if tensors are missing, have a wrong shape, or are unknown.

    Args:
      where: Folder name for messages.
    """
    expected = set()
    # Stops at the first missing tensor, even if the config claims billions of layers.
    for slot in slots(config, model_type):
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
    family = FAMILIES[model_type]
    ignored = ("rotary_emb.inv_freq", *((family.tensor("head"),) if config.tie_head else ()))
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
        shape = shape_of(config, names)
        sharding = NamedSharding(mesh, partition(names) or jax.sharding.PartitionSpec())
        stored = slots_by_kind(folder.model, folder.model_type)[path[-1].key]
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
