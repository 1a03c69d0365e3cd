"""Safetensors: folders of tensors, read as they are mapped and written one after another."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
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
"""Size of a file at most, unless one tensor is larger."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""The types of weights, by their names in files."""

_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor that is, or is to be, in a folder."""

    shape: tuple[int, ...]
    dtype: str
    """Its type, by the name in files: BF16."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    infos: Mapping[str, TensorInfo]
    """In the order of the file."""
    starts: Mapping[str, int]
    """The first byte of each."""


class Tensors(Mapping[str, TensorInfo]):
    """The tensors of a folder; `read` maps one of them into memory."""

    def __init__(self, folder: Path):
        """Opens a folder and reads the headers of its files.

        Raises:
          UserError: A file is missing or damaged, or holds numbers that are no weights.
        """
        self._file_of: dict[str, _File] = {}
        named = _files(folder)
        # The order of transformers, which takes a tensor from the last file that has it.
        for path in sorted(named):
            file = _open(path)
            _check_index(file, named, self._file_of)
            self._file_of |= dict.fromkeys(file.infos, file)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._file_of[name].infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, which stays in its file until it is looked at."""
        file, info = self._file_of[name], self[name]
        return np.memmap(file.path, DTYPES[info.dtype], "r", file.starts[name], info.shape)


def _files(folder: Path) -> dict[Path, set[str]]:
    """Returns the files of a folder, and the tensors that its index names in each of them.

    A single file wins over an index, as in transformers.
    """
    if (folder / ONE_FILE).is_file():
        return {Path(file_inside(folder, ONE_FILE, str(folder))): set()}
    if (folder / INDEX).exists():
        return _indexed_files(folder)
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth"))
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code and is "
            f"not read; save the model as safetensors."
        )
    raise UserError(f"{folder} has no {ONE_FILE} and no {INDEX}; it holds no weights.")


def _indexed_files(folder: Path) -> dict[Path, set[str]]:
    """Returns the files that the index of a folder names, and the tensors in each of them."""
    index = Path(file_inside(folder, INDEX, str(folder)))
    contents = read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index} is not an index of tensors: its weight_map is {shown(weight_map)}; "
            f"download it again."
        )
    named: dict[object, set[str]] = {}
    for tensor, file in weight_map.items():
        if isinstance(file, str) and not file.endswith(_SUFFIX):
            raise UserError(
                f"{index} has {tensor} in {shown(file)}, and only files named *{_SUFFIX} are "
                f"read; save the model as safetensors."
            )
        named.setdefault(file if isinstance(file, str) else repr(file), set()).add(tensor)
    paths = {Path(file_inside(folder, file, INDEX)): found for file, found in named.items()}
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise UserError(
            f"{folder} lacks {', '.join(sorted(absent))}, which {INDEX} names; download "
            f"{'it' if len(absent) == 1 else 'them'} too."
        )
    return paths


def _check_index(
    file: _File, named: Mapping[Path, set[str]], before: Mapping[str, _File]
) -> None:
    """Raises UserError if a file lacks tensors that the index names in it.

    Or if it has another copy of a tensor that the index names in a file before it: then
    transformers takes the later copy, against the index.

    Args:
      before: The files that are open already, by tensor.
    """
    missing = named[file.path] - file.infos.keys()
    if missing:
        raise UserError(
            f"{file.path} has no tensor {min(missing)}, which {INDEX} says it has; "
            f"download the folder again."
        )
    for name in file.infos.keys() & before.keys():
        if name in named[before[name].path]:
            raise UserError(
                f"{file.path} has another copy of {name}, which {INDEX} names in "
                f"{before[name].path.name}; transformers would take this copy: remove it."
            )


def _open(path: Path) -> _File:
    """Returns the header of a file; the library checks that the file is whole."""
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
        if info.dtype not in DTYPES:
            raise UserError(
                f"{name} in {path} is of type {info.dtype}; weights of {', '.join(DTYPES)} can "
                f"be read, and quantised ones cannot."
            )
    # Tensors follow each other without gaps, and end where the file does.
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
    """Writes tensors, one at a time in the order of `infos`, and their index if it needs one.

    The library would have to hold all tensors of a file.

    Args:
      tensors: Tensors, or parts of them along the first axis that follow each other.
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
    """Returns the tensors of each file."""
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
                del part, rows  # before the next one is made


def _chunks(tensor: np.ndarray) -> Iterator[np.ndarray]:
    """Returns a tensor in parts along its first axis, so that no copy is as large as it."""
    return (tensor[rows] for rows in _rows(tensor))


def _rows(tensor: np.ndarray) -> Iterator[slice]:
    row = tensor.nbytes // max(1, len(tensor))
    num_rows = max(1, _CHUNK_BYTES // max(1, row))
    return (slice(i, i + num_rows) for i in range(0, len(tensor), num_rows))


def check_finite(tensor: np.ndarray, name: str, where: str) -> None:
    """Raises UserError if a tensor holds NaN or infinity.

    Args:
      tensor: Numbers of one of `DTYPES`; chunks of them are looked at, never a copy.
      where: The folder, for errors.
    """
    bits = np.dtype(f"u{tensor.dtype.itemsize}")
    # A number is not finite if all bits of its exponent are set: those of infinity.
    exponent = np.array(np.inf, tensor.dtype).view(bits)
    for chunk in _chunks(tensor):
        if np.any((chunk.view(bits) & exponent) == exponent):
            raise not_finite(name, where, tensor.dtype.name)


def same_values(tensor: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two tensors of one shape hold the same numbers, in any types."""
    return all(
        np.array_equal(tensor[rows].astype(np.float64), other[rows].astype(np.float64))
        for rows in _rows(tensor)
    )


def widest(dtypes: Iterable[str]) -> str:
    """Returns the narrowest type that holds the values of all of some types."""
    wide = functools.reduce(jnp.promote_types, (DTYPES[dtype] for dtype in dtypes))
    return next(name for name, dtype in DTYPES.items() if dtype == wide)
