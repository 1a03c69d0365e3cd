"""Safetensors: folders of tensors, read as they are mapped and written one after another."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from stackjax.errors import UserError

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
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
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


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
        for path, listed in _files(folder).items():
            file = _open(path)
            missing = listed - file.infos.keys()
            if missing:
                raise UserError(
                    f"{path} has no tensor {min(missing)}, which {INDEX} says it has; "
                    f"download the folder again."
                )
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
    """Returns the files of a folder, and the tensors that its index says are in each."""
    index, one = folder / INDEX, folder / ONE_FILE
    if index.exists():
        try:
            listed = json.loads(index.read_text())["weight_map"]
            files: dict[Path, set[str]] = {folder / file: set() for file in listed.values()}
            for name, file in listed.items():
                files[folder / file].add(name)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{index} is not an index of tensors ({error}); download it again."
            ) from error
        absent = [path.name for path in files if not path.exists()]
        if absent:
            raise UserError(
                f"{folder} lacks {', '.join(sorted(absent))}, which {INDEX} names; download "
                f"{'it' if len(absent) == 1 else 'them'} too."
            )
        return files
    if one.exists():
        return {one: set()}
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth"))
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code and is "
            f"not read; save the model as safetensors."
        )
    raise UserError(f"{folder} has no {ONE_FILE} and no {INDEX}; it holds no weights.")


def _open(path: Path) -> _File:
    """Returns what the header of a file says; the library checks that the file is whole."""
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
    row = tensor.nbytes // max(1, len(tensor))
    num_rows = max(1, _CHUNK_BYTES // max(1, row))
    return (tensor[i : i + num_rows] for i in range(0, len(tensor), num_rows))


def widest(dtypes: Iterable[str]) -> str:
    """Returns the narrowest type that holds the values of all of some types."""
    wide = functools.reduce(jnp.promote_types, (DTYPES[dtype] for dtype in dtypes))
    return next(name for name, dtype in DTYPES.items() if dtype == wide)
