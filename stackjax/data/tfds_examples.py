"""Documents from TensorFlow Datasets, read without TensorFlow."""

from collections.abc import Iterator
from typing import Any

from stackjax.data.piece import Piece, cut
from stackjax.data.text_field import BadRow, LeftOut, Reading, find_field, leave_out, text_of
from stackjax.runtime.errors import UserError

STDLIB = "stackjax_stdlib"


def list_tfds(name: str, scratch: str, reading: Reading) -> Iterator[Piece]:
    """Yields the pieces of the `train` split and, if present, the `validation` split.

    Args:
      scratch: Directory for the built-in corpus.

    Raises:
      UserError: The dataset is unknown or not prepared, or lacks the feature.
    """
    import tensorflow_datasets as tfds

    data_dir = None
    if name == STDLIB:
        from stackjax.data.corpora import stdlib

        data_dir = scratch
        print("collecting the sources of the Python standard library", flush=True)
        stdlib.build(data_dir)
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
        source = builder.as_data_source(split="train")
    except (ValueError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"input 'tfds:{name}' cannot be read: {reason} (It must have been prepared "
            f"by download_and_prepare with file_format='array_record'.)"
        ) from error
    for index in range(min(1, len(source))):
        _read_example(source, name, index, reading)
    yield from _cut_splits(name, builder.info.splits, data_dir)


def _cut_splits(name: str, splits: Any, data_dir: str | None) -> Iterator[Piece]:
    held_out = {"train": False, "validation": True} if "validation" in splits else {}
    for split in held_out or ("train",):
        examples, num_bytes = splits[split].num_examples, splits[split].num_bytes
        for start, stop in cut(examples, num_bytes):
            yield Piece(
                format="tfds",
                source=name,
                start=start,
                stop=stop,
                num_bytes=num_bytes * (stop - start) // examples,
                tfds_split=split,
                held_out=held_out.get(split),
                data_dir=data_dir,
            )


def read_tfds(piece: Piece, reading: Reading) -> Iterator[str | LeftOut]:
    """Yields the texts in a piece."""
    import tensorflow_datasets as tfds

    if piece.source == STDLIB:
        import stackjax.data.corpora.stdlib  # noqa: F401  Registers the builder.
    source: Any = tfds.data_source(
        piece.source, split=piece.tfds_split, data_dir=piece.data_dir, download=False
    )
    for index in range(piece.start, piece.stop):
        yield _read_example(source, piece.source, index, reading)


def _read_example(source: Any, name: str, index: int, reading: Reading) -> str | LeftOut:
    place = f"'tfds:{name}', {index}"
    try:
        return text_of(find_field(source[index], reading.text_field), reading.text_field)
    except BadRow as error:
        return leave_out(error, reading, lambda: place)
    except RuntimeError as error:  # From ArrayRecord, for damaged files.
        raise UserError(f"{place}: {error}") from error
