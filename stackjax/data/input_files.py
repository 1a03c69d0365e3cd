"""The files behind the inputs of `prepare`: files, globs and directories.

A directory may be laid out like a data set on the Hugging Face Hub: all data files have one
format, and words such as `train` and `validation` in the names of directories and files are
splits.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from stackjax.data.formats import FileFormat, format_of
from stackjax.files.input_file import is_directory, is_there, match_files, walk_files
from stackjax.files.storage import check_bucket
from stackjax.runtime.errors import UserError

FileSplit = Literal["train", "validation", "test"]

_WORDS: tuple[tuple[FileSplit, tuple[str, ...]], ...] = (
    ("train", ("train", "training")),
    ("validation", ("validation", "valid", "val", "dev")),
    ("test", ("test", "testing")),
)
_SPLITS: dict[str, FileSplit] = {word: split for split, words in _WORDS for word in words}
_IGNORED = re.compile(
    r"(README|LICEN[SC]E)[^/]*|(dataset_infos?|dataset_dict|state)\.json", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read."""

    path: str
    held_out: bool | None = None
    """Whether the documents are for validation; None lets the hash of each document decide."""


def find_files(name: str, left_out: Counter[str]) -> list[InputFile]:
    """Returns the sorted files of an input.

    Args:
      left_out: Counts the files of test splits.

    Raises:
      UserError: There are no files, or files of several formats in a directory.
      OSError: The bucket is not usable.
    """
    check_bucket(name)
    if is_directory(name):
        return list(_files_in(name.rstrip("/"), left_out))
    paths = [name] if is_there(name) else match_files(name)
    paths = _without_indices(paths)
    if not paths:
        raise UserError(f"input {name!r} matches no file.")
    return [InputFile(path) for path in paths]


def _without_indices(paths: list[str]) -> list[str]:
    """Returns the paths without those of an index beside a Megatron file."""
    found = set(paths)
    return [path for path in paths if path[-4:] != ".idx" or f"{path[:-4]}.bin" not in found]


def _files_in(directory: str, left_out: Counter[str]) -> Iterator[InputFile]:
    names = sorted(name for name in walk_files(directory) if not _is_ignored(name))
    names = _without_indices(names)
    if not names:
        raise UserError(f"input {directory!r} is a directory without data files.")
    kind = _common_format(directory, names)
    splits = [_split_of(name, kind) for name in names]
    has_validation = "validation" in splits
    for name, split in zip(names, splits, strict=True):
        if split == "test":
            left_out["file of a test split"] += 1
        else:
            held_out = split == "validation" if has_validation else None
            yield InputFile(f"{directory}/{name}", held_out)


def _is_ignored(name: str) -> bool:
    return _IGNORED.fullmatch(os.path.basename(name)) is not None


def _common_format(directory: str, names: list[str]) -> FileFormat:
    first = names[0]
    kind = format_of(f"{directory}/{first}")
    for name in names:
        other = format_of(f"{directory}/{name}")
        if other != kind:
            raise UserError(
                f"input {directory!r} has files of several formats, such as {first!r} ({kind}) "
                f"and {name!r} ({other}); name the files of one format with a glob, such as "
                f"'{directory}/**/*{os.path.splitext(first)[1]}'."
            )
    return kind


def _split_of(name: str, kind: FileFormat) -> FileSplit:
    """Returns the split that a file's relative name has; by default `train`.

    In a tree of plain text, only a directory at the top is a split.
    """
    *places, file = name.lower().split("/")
    words = places[:1] if kind == "text" else [*places, *re.split(r"[-._ 0-9]+", file)]
    for word in words:
        if word in _SPLITS:
            return _SPLITS[word]
    return "train"
