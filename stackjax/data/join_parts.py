"""The data set from finished parts."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from stackjax.data.counts import InputCounts, write_inputs
from stackjax.data.hashes import count_shared, merge_hashes, side_file
from stackjax.data.manifest import SPLITS, Manifest, Split, SplitName, TokenDtype
from stackjax.data.part_record import WrittenPart, WrittenSplit, hashes_file, read_record
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer_info import TokenizerInfo

Written = dict[SplitName, list[tuple[int, WrittenSplit]]]
"""Part index and written split, by split and in order."""


def join_parts(
    parts: Path, target: Path, num_parts: int, info: TokenizerInfo, dtype: TokenDtype
) -> Manifest:
    """Returns the manifest, after moving all shards to the directory `target`.

    Document hashes and counts are written there too.

    Raises:
      UserError: There are no documents for training.
    """
    target.mkdir()
    written = _written(parts, num_parts)
    if not written["train"]:
        shutil.rmtree(parts)  # Nothing to go on from.
        raise UserError("the inputs have no text for the split 'train'; give more text.")
    splits: dict[SplitName, Split] = {
        name: _join_split(parts, target, name, written[name]) for name in SPLITS
    }
    inputs, left_out = write_inputs(target, _inputs(parts, num_parts))
    for source, final in _moves(written):
        (parts / source).rename(target / final)
    return Manifest(
        tokenizer=info,
        dtype=dtype,
        splits=splits,
        shared_documents=count_shared(*(target / _hashes_name(name) for name in SPLITS)),
        left_out=dict(sorted(left_out.items())),
        inputs=inputs,
    )


def undo_join(parts: Path, target: Path, num_parts: int) -> None:
    """Moves the shards back after a killed `join_parts`, and removes `target`."""
    if not target.is_dir():
        return
    if all(read_record(parts, index) is not None for index in range(num_parts)):
        for source, final in _moves(_written(parts, num_parts)):
            if (target / final).exists():
                (target / final).rename(parts / source)
    shutil.rmtree(target)


def _join_split(
    parts: Path, target: Path, name: SplitName, written: list[tuple[int, WrittenSplit]]
) -> Split:
    """Writes the hashes of a split, and returns its manifest entry."""
    documents = sum(each.documents for _, each in written)
    hashes = target / _hashes_name(name)
    different = merge_hashes([parts / hashes_file(index, name) for index, _ in written], hashes)
    shards = tuple(
        each.shard.with_name(_final_name(name, i, len(written)))
        for i, (_, each) in enumerate(written)
    )
    return Split(
        tokens=sum(shard.tokens for shard in shards),
        documents=documents,
        shards=shards,
        duplicates=documents - different,
        hashes=side_file(hashes),
    )


def _moves(written: Written) -> Iterator[tuple[str, str]]:
    """Yields the name of each shard file among the parts and in the data set."""
    for name, shards in written.items():
        for i, (_, each) in enumerate(shards):
            final = each.shard.with_name(_final_name(name, i, len(shards)))
            yield from zip(each.shard.files, final.files, strict=True)


def _final_name(name: SplitName, index: int, count: int) -> str:
    return f"{name}-{index:05d}-of-{count:05d}.array_record"


def _hashes_name(name: SplitName) -> str:
    return f"{name}.hashes"


def _written(parts: Path, num_parts: int) -> Written:
    found: Written = {name: [] for name in SPLITS}
    for index, part in enumerate(_records(parts, num_parts)):
        for name, each in part.splits.items():
            found[name].append((index, each))
    return found


def _inputs(parts: Path, num_parts: int) -> Iterator[InputCounts]:
    for part in _records(parts, num_parts):
        yield from part.inputs


def _records(parts: Path, num_parts: int) -> Iterator[WrittenPart]:
    """Yields the record of each part, one at a time in memory."""
    for index in range(num_parts):
        part = read_record(parts, index)
        if part is None:
            raise OSError(f"the record of part {index} in {parts} is missing; start again.")
        yield part
