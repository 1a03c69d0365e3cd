"""Training of a tokenizer on the inputs of `prepare`.

The tokenizer depends only on the inputs and the options, not on the number of threads.
"""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from etils import epath

from stackjax.data.document_sample import DocumentSample
from stackjax.data.documents import list_pieces, read_documents
from stackjax.data.parts import tell_listing
from stackjax.data.piece import Piece
from stackjax.data.text_field import Reading
from stackjax.data.tokenizer_config import TokenizerConfig
from stackjax.files.output import check_new_file
from stackjax.files.storage import replace_text
from stackjax.runtime.errors import UserError
from stackjax.runtime.progress_bar import progress_bar
from stackjax.runtime.text_table import aligned
from stackjax.runtime.worker_pool import run_in_process
from stackjax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from stackjax.tokenizer.train_bpe import check_vocabulary, cut_text, train_bpe

MEASURED_BYTES = 2**23
"""Total size of the samples for the report."""


@dataclasses.dataclass
class Total:
    """A number of documents, and their size."""

    documents: int = 0
    num_bytes: int = 0

    def add(self, document: bytes) -> None:
        """Counts a document."""
        self.documents += 1
        self.num_bytes += len(document)


class InputTexts(NamedTuple):
    """The texts of an input."""

    total: Total
    sample: DocumentSample
    """Some documents, for the report."""


class Trained(NamedTuple):
    """The result of training."""

    definition: str
    """Contents of tokenizer.json."""
    used: Total
    """The documents in training."""
    texts: Mapping[str, InputTexts]
    """The texts by input."""


def write_tokenizer(config: TokenizerConfig) -> str:
    """Writes a tokenizer.json and returns a report of the bytes per token.

    The file is complete or absent.

    Raises:
      UserError: An input is invalid, has too little text, or the output exists.
      OSError: Reading or writing failed, or memory is too small.
    """
    _check_output(config)
    check_vocabulary(config.vocab_size, config.special_tokens)
    with tempfile.TemporaryDirectory(prefix="stackjax-") as scratch:
        pieces = list_pieces(config.inputs, scratch, _reading(config), Counter())
        trained = _train_in_process(config, list(tell_listing(pieces)))
    replace_text(epath.Path(config.output), trained.definition)
    return _report(config, trained)


def _check_output(config: TokenizerConfig) -> None:
    if config.output.suffix != ".json":
        raise UserError(
            f"output is {config.output}; it must end in .json, so that `prepare` reads it."
        )
    check_new_file("output", config.output)


def _train_in_process(config: TokenizerConfig, pieces: list[Piece]) -> Trained:
    """Returns the result of `train`. The library blocks Ctrl-C in its own process."""
    try:
        return run_in_process(train, config, pieces)
    except (BrokenProcessPool, MemoryError) as error:
        raise OSError(
            "the training process ended, perhaps for lack of memory; train on less text with "
            "--max-bytes."
        ) from error


def train(config: TokenizerConfig, pieces: list[Piece]) -> Trained:
    """Returns the tokenizer, trained on all documents or on a sample.

    Raises:
      UserError: A document is unreadable, or there is too little text.
    """
    size = MEASURED_BYTES // len(config.inputs)
    texts = {name: InputTexts(Total(), DocumentSample(size)) for name in config.inputs}
    used = Total()
    num_bytes = sum(piece.num_bytes for piece in pieces)
    with progress_bar("reading", num_bytes, in_bytes=True, in_log=True) as advance:
        documents = _read(config, pieces, texts, advance)
        if config.max_bytes is not None:
            documents = _draw(documents, config.max_bytes)
        decoded = _decode(documents, used)
        definition = train_bpe(decoded, config.vocab_size, config.special_tokens)
    return Trained(definition, used, texts)


def _read(
    config: TokenizerConfig,
    pieces: list[Piece],
    texts: Mapping[str, InputTexts],
    advance: Callable[[int], None],
) -> Iterator[bytes]:
    """Yields all documents with text, and adds each to the texts of its input."""
    for piece in pieces:
        for text in read_documents(piece, _reading(config)):
            if isinstance(text, str) and text:
                document = text.encode()
                texts[piece.input].total.add(document)
                texts[piece.input].sample.add(document)
                yield document
        advance(piece.num_bytes)
    if not any(each.total.documents for each in texts.values()):
        raise UserError(f"the inputs have no text: {' '.join(config.inputs):.300}.")


def _reading(config: TokenizerConfig) -> Reading:
    return Reading(
        text_field=config.text_field,
        on_missing=config.on_missing,
        on_invalid=config.on_invalid,
    )


def _draw(documents: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yields a sample of the documents."""
    sample = DocumentSample(max_bytes)
    for document in documents:
        sample.add(document)
    if sample.num_bytes > max_bytes:
        raise UserError(
            f"max_bytes is {max_bytes}, but the first document of the sample has "
            f"{sample.num_bytes} bytes; pass --max-bytes {sample.num_bytes} or more."
        )
    yield from sample.documents


def _decode(documents: Iterable[bytes], used: Total) -> Iterator[str]:
    """Yields the documents as texts, and counts them; tells when training goes on."""
    for document in documents:
        used.add(document)
        yield document.decode()
    print(f"merging pairs of tokens, from {used.num_bytes / 1e6:.1f} MB", flush=True)


def _report(config: TokenizerConfig, trained: Trained) -> str:
    """Returns the bytes per token by input, measured on the samples."""
    tokenizer = load_tokenizer(str(config.output), config.special_tokens[0])
    head = ("input", "documents", "bytes", "of them measured", "bytes", "tokens", "bytes/token")
    rows = [_row(name, each, tokenizer) for name, each in trained.texts.items()]
    used, entries = trained.used, tokenizer.vocab_size
    return "\n".join(
        [
            f"{config.output}: {entries} entries from {used.documents} documents, "
            f"{used.num_bytes} bytes",
            f"measured on a sample of each input: one document or more, up to "
            f"{MEASURED_BYTES // len(rows)} bytes, selected by a text hash",
            aligned([head, *rows]),
        ]
    )


def _row(name: str, texts: InputTexts, tokenizer: Tokenizer) -> tuple[str, ...]:
    documents = texts.sample.documents
    chunks = (chunk for document in documents for chunk in cut_text(document.decode()))
    tokens = sum(len(tokenizer.encode(chunk)) for chunk in chunks)
    ratio = f"{texts.sample.num_bytes / tokens:.3f}" if tokens else "-"
    counts = (
        texts.total.documents,
        texts.total.num_bytes,
        len(documents),
        texts.sample.num_bytes,
        tokens,
    )
    return (name, *map(str, counts), ratio)
