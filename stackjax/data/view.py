"""The contents of a data set, in numbers and examples."""

import dataclasses
from typing import Any

from etils import epath

from stackjax.data.example_documents import Example, example_documents
from stackjax.data.input_totals import InputTotals, total_inputs
from stackjax.data.length_counts import LengthCounts, split_lengths
from stackjax.data.manifest import MANIFEST, Manifest, SplitName, read_manifest
from stackjax.data.overlap import Overlap, overlap
from stackjax.data.view_config import DataViewConfig
from stackjax.files.storage import check_bucket
from stackjax.tokenizer.tokenizer import Tokenizer
from stackjax.tokenizer.tokenizer_info import stored_tokenizer

NUM_LARGEST = 10
"""Input files to show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataView:
    """A data set."""

    path: str
    manifest: Manifest
    tokenizer: Tokenizer
    lengths: dict[SplitName, LengthCounts]
    """Document lengths by split, without empty splits."""
    inputs: InputTotals | None
    """The input files; None if not counted."""
    overlaps: dict[str, Overlap]
    """Shared documents by the path of another data set."""
    examples: tuple[Example, ...]
    """Training documents."""

    @property
    def tokens(self) -> int:
        """Number of tokens in all splits."""
        return sum(split.tokens for split in self.manifest.splits.values())

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of all documents per token; None if unknown."""
        if self.inputs is None or self.manifest.hashed != "text" or not self.tokens:
            return None
        return self.inputs.bytes / self.tokens


def view(config: DataViewConfig) -> DataView:
    """Returns a data set's numbers and examples, in little memory.

    Raises:
      UserError: A data set is missing or damaged, or does not compare.
      OSError: A file cannot be read.
    """
    path = config.directory
    for each in (path, *config.compare_with):
        check_bucket(each)
    manifest, directory = read_manifest(path), epath.Path(path)
    lengths: dict[SplitName, LengthCounts] = {
        name: split_lengths(path, split)
        for name, split in manifest.splits.items()
        if split.documents
    }
    has_examples = config.examples > 0 and "train" in lengths
    return DataView(
        path=path,
        manifest=manifest,
        tokenizer=stored_tokenizer(directory, manifest.tokenizer, str(directory / MANIFEST)),
        lengths=lengths,
        inputs=total_inputs(path, NUM_LARGEST) if manifest.inputs else None,
        overlaps={other: overlap(path, other) for other in config.compare_with},
        examples=tuple(
            example_documents(path, "train", config.examples) if has_examples else ()
        ),
    )


def to_json(found: DataView) -> dict[str, Any]:
    """Returns all numbers for a JSON file."""
    manifest = found.manifest
    return {
        "path": found.path,
        "digest": manifest.digest,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "dtype": manifest.dtype,
        "hashed": manifest.hashed,
        "bytes_per_token": found.bytes_per_token,
        "splits": {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "duplicates": None if split.hashes is None else split.duplicates,
                "lengths": _lengths(found.lengths.get(name)),
            }
            for name, split in manifest.splits.items()
        },
        "shared_documents": manifest.shared_documents,
        "left_out": manifest.left_out,
        "inputs": None if found.inputs is None else dataclasses.asdict(found.inputs),
        "overlaps": {path: dataclasses.asdict(each) for path, each in found.overlaps.items()},
        "examples": [dataclasses.asdict(each) for each in found.examples],
    }


def _lengths(counts: LengthCounts | None) -> dict[str, Any] | None:
    if counts is None:
        return None
    return {
        "mean": counts.mean,
        "median": counts.median,
        "longest": counts.longest,
        "histogram": [each._asdict() for each in counts.octaves()],
    }
