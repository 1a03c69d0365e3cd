"""Tensor types in the Hugging Face folder from which a model was imported.

Checkpoints hold float32; export writes every tensor in the original type.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from etils import epath

from stackjax.interop.config_json import read_json
from stackjax.interop.rule import shown
from stackjax.interop.tensors import DTYPES, widest
from stackjax.runtime.errors import UserError

TYPES = "dtypes.json"
"""File with the type of every tensor, next to the folder's other files."""


def write_types(types: Mapping[str, str], directory: epath.Path) -> None:
    """Writes tensor types; float64 is recorded as float32, as in checkpoints."""
    held = {name: "F32" if dtype == "F64" else dtype for name, dtype in types.items()}
    (directory / TYPES).write_text(json.dumps(held, indent=2) + "\n")


def read_types(directory: Path) -> Mapping[str, str]:
    """Returns the recorded type of every tensor.

    Raises:
      UserError: The file is damaged.
    """
    file = directory / TYPES
    types = read_json(file)
    if not isinstance(types, dict) or not types or not set(types.values()) <= DTYPES.keys():
        raise UserError(
            f"{file} is {shown(types)}; it must give the type of each tensor: convert the "
            f"folder again."
        )
    return types


def types_of(names: Iterable[str], stored: Mapping[str, str]) -> dict[str, str]:
    """Returns the type of every named tensor.

    Tensors from the folder keep their type. A new tensor, for example in a new layer, gets
    the widest type among all layers.
    """
    kinds: dict[str, set[str]] = {}
    for name, dtype in stored.items():
        kinds.setdefault(_kind(name), set()).add(dtype)
    wide = {kind: widest(dtypes) for kind, dtypes in kinds.items()}
    widest_of_all = widest(wide.values())
    return {n: stored.get(n, wide.get(_kind(n), widest_of_all)) for n in names}


def _kind(name: str) -> str:
    """Returns a tensor name without the layer number."""
    return re.sub(r"\.layers\.\d+\.", ".", name)
