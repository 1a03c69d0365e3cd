"""Counts of documents by input file."""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from stackjax.data.manifest import SideFile, again, read_manifest
from stackjax.runtime.errors import UserError

INPUTS = "inputs.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputCounts:
    """Documents from a single input file."""

    source: str
    """The file, or a TFDS dataset name."""
    documents: int
    """Documents in the data set."""
    bytes: int
    """Total size of these documents: UTF-8 bytes, or bytes of tokens."""
    left_out: dict[str, int]
    """Rows and documents outside the data set, by reason."""


def read_inputs(path: str) -> Iterator[InputCounts]:
    """Yields the counts of a data set, in the order of the inputs.

    Raises:
      UserError: The data set has no counts, or the file is damaged.
    """
    listed = read_manifest(path).inputs
    if listed is None:
        raise UserError(f"{path!r} has no {INPUTS}; {again(path)}.")
    file = epath.Path(path) / listed.file
    digest = hashlib.sha256()
    with file.open("rb") as lines:
        for line in lines:
            digest.update(line)
    if digest.hexdigest() != listed.sha256:
        raise UserError(f"{str(file)!r} has other counts than in the manifest; {again(path)}.")
    with file.open("rb") as lines:
        for line in lines:
            yield InputCounts(**json.loads(line))


def write_inputs(
    directory: Path, counts: Iterable[InputCounts]
) -> tuple[SideFile, Counter[str]]:
    """Writes a line per input file; returns the manifest entry and the total left out.

    Consecutive counts of the same file are added.
    """
    digest, left_out, size = hashlib.sha256(), Counter[str](), 0
    with open(directory / INPUTS, "wb") as file:
        for source, group in itertools.groupby(counts, key=lambda each: each.source):
            row = _add(source, list(group))
            left_out.update(row.left_out)
            line = json.dumps(dataclasses.asdict(row)).encode() + b"\n"
            file.write(line)
            digest.update(line)
            size += len(line)
    return SideFile(file=INPUTS, bytes=size, sha256=digest.hexdigest()), left_out


def _add(source: str, counts: list[InputCounts]) -> InputCounts:
    left_out = sum((Counter(each.left_out) for each in counts), Counter())
    return InputCounts(
        source=source,
        documents=sum(each.documents for each in counts),
        bytes=sum(each.bytes for each in counts),
        left_out=dict(sorted(left_out.items())),
    )
