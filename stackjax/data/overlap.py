"""Documents shared by two data sets."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from stackjax.data.hashes import count_shared
from stackjax.data.manifest import SplitName, again, read_manifest
from stackjax.files.storage import is_remote
from stackjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Numbers of different documents shared by two data sets."""

    train: int
    """In both training splits."""
    validation_in_train: int
    """In the first set's validation split, and in the second set's training split."""
    train_in_validation: int
    """In the first set's training split, and in the second set's validation split."""
    validation: int
    """In both validation splits."""


def overlap(first: str, second: str) -> Overlap:
    """Returns the documents shared by two data sets, in little memory.

    Documents are equal if their hashes are equal: hashes of texts, or of tokens.

    Raises:
      UserError: A data set is missing or damaged, or the hashes are of different kinds.
    """
    manifest = read_manifest(first)
    digest, hashed = manifest.tokenizer.digest, manifest.hashed
    for path in (first, second):
        check_same_kind(first, digest, hashed, path)
    with _hashes(first) as ours, _hashes(second) as theirs:
        return Overlap(
            train=count_shared(ours["train"], theirs["train"]),
            validation_in_train=count_shared(ours["validation"], theirs["train"]),
            train_in_validation=count_shared(ours["train"], theirs["validation"]),
            validation=count_shared(ours["validation"], theirs["validation"]),
        )


def check_same_kind(first: str, digest: str, hashed: str, second: str) -> None:
    """Raises UserError if the documents of two data sets cannot be compared.

    Args:
      digest: The first set's tokenizer digest.
      hashed: The kind of the first set's hashes.
    """
    other = read_manifest(second)
    if not all(split.hashes for split in other.splits.values()):
        raise UserError(f"{second!r} has no document hashes; {again(second)}.")
    if hashed != other.hashed:
        raise UserError(
            f"{first!r} has hashes of {hashed}, and {second!r} of {other.hashed}, so their "
            f"documents cannot be compared; prepare both from texts, or both from token files."
        )
    if hashed == "tokens" and digest != other.tokenizer.digest:
        raise UserError(
            f"{first!r} and {second!r} are from token files of different tokenizers, so their "
            f"documents cannot be compared; prepare both with the same tokenizer."
        )


@contextlib.contextmanager
def _hashes(path: str) -> Iterator[dict[SplitName, Path]]:
    """Yields the hash file of each split, on a disk."""
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[SplitName, Path] = {}
        for name, split in read_manifest(path).splits.items():
            assert split.hashes is not None, "checked by the caller"
            source = epath.Path(path) / split.hashes.file
            if source.stat().length != split.hashes.bytes:
                raise UserError(f"{str(source)!r} is damaged; {again(path)}.")
            if is_remote(path):
                source = source.copy(epath.Path(scratch) / split.hashes.file)
            found[name] = Path(source)
        yield found
