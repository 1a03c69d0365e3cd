"""Safetensors files: memory-mapped reading and tensor-by-tensor writing."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from stackjax.files.paths import file_inside
from stackjax.interop.config_json import read_json
from stackjax.interop.rule import shown
from stackjax.runtime.errors import UserError, not_finite

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_SUFFIX = ".safetensors"
SHARD_BYTES = 5 * 10**9
"""Maximum file size, except for a single larger tensor."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""Supported weight types by safetensors name."""

_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str
    """Safetensors type, such as `BF16`."""

    @property
    def num_bytes(self) -> int:
        masks = {"BOOL": 1, "U8": 1}  # of ignored tensors
        width = masks.get(self.dtype) or DTYPES[self.dtype].itemsize
        return math.prod(self.shape) * width


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    infos: Mapping[str, TensorInfo]
    """Tensors in file order."""
    starts: Mapping[str, int]
    """Byte offset of each tensor."""


class Tensors(Mapping[str, TensorInfo]):
    """All tensors in a folder; `read` maps a tensor into memory."""

    def __init__(
        self,
        folder: Path,
        renamed: Callable[[str], str] = str,
        ignored: tuple[str, ...] = (),
    ):
        """Opens a folder and reads all file headers.

        Args:
          renamed: Returns a tensor's name, from its name in a file.
          ignored: Ends of the names of tensors that are left out, of any type.

        Raises:
          UserError: A file is missing, damaged, or has an unsupported type.
        """
        self._file_of: dict[str, _File] = {}
        named = _files(folder)
        # As in transformers, the last file with a tensor wins.
        for path in sorted(named):
            file = _open(path, ignored)
            _check_index(file, named, self._file_of)
            self._file_of |= dict.fromkeys(file.infos, file)
        self._stored = {
            renamed(name): name for name in self._file_of if not name.endswith(ignored)
        }

    def __getitem__(self, name: str) -> TensorInfo:
        stored = self._stored[name]
        return self._file_of[stored].infos[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, name: str) -> np.ndarray:
        """Returns a memory-mapped tensor."""
        stored, info = self._stored[name], self[name]
        file = self._file_of[stored]
        return np.memmap(file.path, DTYPES[info.dtype], "r", file.starts[stored], info.shape)


def _files(folder: Path) -> dict[Path, set[str]]:
    """Returns a folder's weight files, each with the tensors listed in the index.

    As in transformers, a single file has priority over an index.
    """
    if (folder / ONE_FILE).is_file():
        return {Path(file_inside(folder, ONE_FILE, str(folder))): set()}
    if (folder / INDEX).exists():
        return _indexed_files(folder)
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth"))
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which could run code; save "
            f"the model as safetensors."
        )
    raise UserError(f"{folder} has no weights: neither {ONE_FILE} nor {INDEX}.")


def _indexed_files(folder: Path) -> dict[Path, set[str]]:
    """Returns the files listed in a folder's index, each with tensor names."""
    index = Path(file_inside(folder, INDEX, str(folder)))
    contents = read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index} is not a tensor index: weight_map is {shown(weight_map)}; "
            f"download it again."
        )
    named: dict[object, set[str]] = {}
    for tensor, file in weight_map.items():
        if isinstance(file, str) and not file.endswith(_SUFFIX):
            raise UserError(
                f"{index} has {tensor} in {shown(file)}, not in a file named *{_SUFFIX}; save "
                f"the model as safetensors."
            )
        named.setdefault(file if isinstance(file, str) else repr(file), set()).add(tensor)
    paths = {Path(file_inside(folder, file, INDEX)): found for file, found in named.items()}
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise UserError(
            f"{folder} lacks {', '.join(sorted(absent))}, listed in {INDEX}; download "
            f"{'it' if len(absent) == 1 else 'them'} too."
        )
    return paths


def _check_index(
    file: _File, named: Mapping[Path, set[str]], before: Mapping[str, _File]
) -> None:
    """Raises UserError if a file lacks listed tensors or duplicates earlier tensors.

    Transformers would load a duplicate from the later file, against the index.

    Args:
      before: Maps tensor names to the files opened so far.
    """
    missing = named[file.path] - file.infos.keys()
    if missing:
        raise UserError(
            f"{file.path} has no tensor {min(missing)}, listed in {INDEX}; "
            f"download the folder again."
        )
    for name in file.infos.keys() & before.keys():
        if name in named[before[name].path]:
            raise UserError(
                f"{file.path} has another copy of {name}, listed in {INDEX} for "
                f"{before[name].path.name}; transformers would take this copy: remove it."
            )


def _open(path: Path, ignored: tuple[str, ...]) -> _File:
    """Returns a file's header; safetensors verifies the file size."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            infos = {
                name: TensorInfo(tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); download it again.") from error
    for name, info in infos.items():
        if info.dtype not in DTYPES and not name.endswith(ignored):
            raise UserError(
                f"{name} in {path} is of type {info.dtype}; it must be {', '.join(DTYPES)}: "
                f"quantized weights are not supported."
            )
    # Tensors are contiguous up to the end.
    ends = list(itertools.accumulate(info.num_bytes for info in infos.values()))
    first = path.stat().st_size - (ends[-1] if ends else 0)
    starts = [first + end for end in (0, *ends)]
    return _File(path, infos, dict(zip(infos, starts, strict=False)))


def write_tensors(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors in the order of `infos`, with an index if there are several files.

    Memory holds a single tensor, while the safetensors library needs a whole file.

    Args:
      tensors: Tensors, or consecutive slices along their first axis.
    """
    shards = _shards(infos, shard_bytes)
    remaining = iter(tensors)
    weight_map = {}
    for i, names in enumerate(shards):
        file = ONE_FILE
        if len(shards) > 1:
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, {name: infos[name] for name in names}, remaining)
        weight_map |= dict.fromkeys(names, file)
    assert next(remaining, None) is None, "a tensor was not announced"
    if len(shards) > 1:
        total = sum(info.num_bytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Returns tensor names for each file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.num_bytes
    return shards


def _write_file(
    path: Path, infos: Mapping[str, TensorInfo], tensors: Iterator[np.ndarray]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, info in infos.items():
        end = start + info.num_bytes
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            missing = info.shape[0]
            while missing:
                part = next(tensors)
                assert part.shape[1:] == info.shape[1:], f"{name} is {part.shape}"
                assert part.dtype == DTYPES[info.dtype], f"{name} is {part.dtype}"
                for rows in _chunks(part):
                    file.write(np.ascontiguousarray(rows).view(np.uint8).data)
                missing -= len(part)
                assert missing >= 0, f"{name} has more than {info.shape[0]} rows"
                del part, rows  # free memory before the next tensor


def _chunks(tensor: np.ndarray) -> Iterator[np.ndarray]:
    """Returns slices along the first axis, to avoid a copy of the whole tensor."""
    return (tensor[rows] for rows in _rows(tensor))


def _rows(tensor: np.ndarray) -> Iterator[slice]:
    row = tensor.nbytes // max(1, len(tensor))
    num_rows = max(1, _CHUNK_BYTES // max(1, row))
    return (slice(i, i + num_rows) for i in range(0, len(tensor), num_rows))


def check_finite(tensor: np.ndarray, name: str, where: str) -> None:
    """Raises UserError if a tensor holds NaN or infinity.

    Args:
      tensor: Array with a type in `DTYPES`; checked in chunks, without a copy.
      where: Folder name for messages.
    """
    bits = np.dtype(f"u{tensor.dtype.itemsize}")
    # A non-finite number has all exponent bits set, like infinity.
    exponent = np.array(np.inf, tensor.dtype).view(bits)
    for chunk in _chunks(tensor):
        if np.any((chunk.view(bits) & exponent) == exponent):
            raise not_finite(name, where, tensor.dtype.name)


def same_values(tensor: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two tensors are equal as float64."""
    return all(
        np.array_equal(tensor[rows].astype(np.float64), other[rows].astype(np.float64))
        for rows in _rows(tensor)
    )


def widest(dtypes: Iterable[str]) -> str:
    """Returns the narrowest type to which all given types promote."""
    wide = functools.reduce(jnp.promote_types, (DTYPES[dtype] for dtype in dtypes))
    return next(name for name, dtype in DTYPES.items() if dtype == wide)
