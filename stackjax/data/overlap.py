"""Documents shared by two data sets."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath

from stackjax.data.config import SourceConfig
from stackjax.data.hashes import count_shared, merge_hashes
from stackjax.data.manifest import Manifest, SplitName, again, read_manifest
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
    with (
        _hashes(first, "train") as train,
        _hashes(first, "validation") as validation,
        _hashes(second, "train") as other_train,
        _hashes(second, "validation") as other_validation,
    ):
        return Overlap(
            train=count_shared(train, other_train),
            validation_in_train=count_shared(validation, other_train),
            train_in_validation=count_shared(train, other_validation),
            validation=count_shared(validation, other_validation),
        )


def check_held_out(sources: Sequence[SourceConfig]) -> None:
    """Raises UserError if a source trains on documents that another source holds out.

    Sets without document hashes, or with hashes of another kind, are not compared.
    """
    manifests = {source.name: read_manifest(source.path) for source in sources}
    for kind in ("text", "tokens"):
        alike = [
            source
            for source in sources
            if manifests[source.name].hashed == kind
            and all(split.hashes for split in manifests[source.name].splits.values())
        ]
        with contextlib.ExitStack() as stack:
            held_out = {
                source.name: stack.enter_context(_hashes(source.path, "validation"))
                for source in alike
            }
            every = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "validation"
            merge_hashes(list(held_out.values()), every)
            for source in alike:
                _check_trains_on_none(source, manifests, held_out, every)


def _check_trains_on_none(
    source: SourceConfig,
    manifests: Mapping[str, Manifest],
    held_out: Mapping[str, Path],
    every: Path,
) -> None:
    """Raises UserError if a source trains on documents that another source holds out.

    Args:
      held_out: The validation hashes of each source.
      every: All of these hashes together.
    """
    with _hashes(source.path, "train") as train:
        if not count_shared(train, every):  # one pass for all other sources
            return
        for name in [name for name in held_out if name != source.name]:
            shared = count_shared(train, held_out[name])
            if shared:
                pair = (manifests[each].validation_fraction for each in (name, source.name))
                raise UserError(
                    f"{shared} documents are held out by the source {name!r} and in the "
                    f"training split of {source.name!r}; prepare both with the same "
                    f"--validation-fraction (now {' and '.join(map(str, pair))}), or leave "
                    f"these documents out of one."
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
def _hashes(path: str, split: SplitName) -> Iterator[Path]:
    """Yields the hash file of a split, on a disk."""
    hashes = read_manifest(path).splits[split].hashes
    assert hashes is not None, "checked by the caller"
    source = epath.Path(path) / hashes.file
    if not source.exists() or source.stat().length != hashes.bytes:
        raise UserError(f"{str(source)!r} is missing or damaged; {again(path)}.")
    with tempfile.TemporaryDirectory() as scratch:
        if is_remote(path):
            source = source.copy(epath.Path(scratch) / hashes.file)
        yield Path(source)
