"""The types that a model's tensors had in the folder that it comes from.

A checkpoint holds float32. Its tensors go out in the types that they came in.
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
"""The file with the type of each tensor, beside the other files of a folder."""


def write_types(types: Mapping[str, str], directory: epath.Path) -> None:
    """Writes the type of each tensor; float64 becomes float32, as in checkpoints."""
    held = {name: "F32" if dtype == "F64" else dtype for name, dtype in types.items()}
    (directory / TYPES).write_text(json.dumps(held, indent=2) + "\n")


def read_types(directory: Path) -> Mapping[str, str]:
    """Returns the type of each tensor; UserError if they cannot be read."""
    file = directory / TYPES
    types = read_json(file)
    if not isinstance(types, dict) or not types or not set(types.values()) <= DTYPES.keys():
        raise UserError(
            f"{file} is {shown(types)}; it must give the type of each tensor: convert the "
            f"folder again."
        )
    return types


def types_of(names: Iterable[str], stored: Mapping[str, str]) -> dict[str, str]:
    """Returns the type of each tensor of a model that comes from a folder.

    A tensor has the type that the folder stored it in. A tensor that the folder did not have,
    such as those of a new layer, has the widest type of its kind in all layers.
    """
    kinds: dict[str, set[str]] = {}
    for name, dtype in stored.items():
        kinds.setdefault(_kind(name), set()).add(dtype)
    wide = {kind: widest(dtypes) for kind, dtypes in kinds.items()}
    widest_of_all = widest(wide.values())
    return {n: stored.get(n, wide.get(_kind(n), widest_of_all)) for n in names}


def _kind(name: str) -> str:
    """Returns the name of a tensor without the number of its layer."""
    return re.sub(r"\.layers\.\d+\.", ".", name)
