"""Tokenizers: bytes, a Hugging Face `tokenizer.json`, or a SentencePiece `.model`."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stackjax.errors import UserError

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to tokens and back. No token is added at the beginning or at the end."""

    name: str
    """What it was loaded as: `bytes`, or a path."""
    vocab_size: int
    """Number of tokens; every token is below it."""
    end_id: int
    """The token that ends a document."""
    digest: str
    """SHA-256 of what defines the tokenizer."""
    encode: Callable[[str], np.ndarray]
    """Returns the tokens of a text, one axis of integers."""
    decode: Callable[[Sequence[int]], str]
    """Returns the text of some tokens; end tokens may be left out of it."""
    find: Callable[[str], int | None]
    """Returns the token that is written so, such as `</s>`; None if there is none."""


class Tokenization(NamedTuple):
    """How a model reads texts."""

    tokenizer: Tokenizer
    prefix_id: int
    """The token before a text: the one that begins it, or that has ended the one before."""
    is_prefixed: bool
    """Whether that token is put before every text that is to be continued."""


def load_tokenizer(name: str, end_token: str | int | None = None) -> Tokenizer:
    """Returns the tokenizer called `bytes`, or the one in a `.json` or `.model` file.

    Args:
      end_token: The token that ends a document, as it is written or by its number, where it
        is not one of the usual ones.

    Raises:
      UserError: The file cannot be read as a tokenizer, or has no end token.
    """
    if name == "bytes":
        if end_token is not None:
            raise UserError(
                f"end token {end_token!r} does not go with the tokenizer 'bytes', which "
                f"ends documents with byte 0; leave it out."
            )
        return _bytes_tokenizer()
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"tokenizer {name!r} is not a file; give 'bytes', or a path to a Hugging "
            f"Face tokenizer.json or to a SentencePiece .model."
        )
    if path.suffix not in (".json", ".model"):
        raise UserError(
            f"tokenizer {name!r} ends in neither .json (Hugging Face) nor .model "
            f"(SentencePiece), so its format is not known."
        )
    load = _load_hugging_face if path.suffix == ".json" else _load_sentencepiece
    return load(name, path.read_bytes(), end_token)


def _bytes_tokenizer() -> Tokenizer:
    """Returns UTF-8 bytes as tokens; byte 0 ends documents and is dropped from text."""

    def encode(text: str) -> np.ndarray:
        data = text.encode("utf-8").replace(b"\0", b"")
        return np.frombuffer(data, np.uint8)

    def decode(tokens: Sequence[int]) -> str:
        data = np.asarray(tokens, np.uint8).tobytes().replace(b"\0", b"")
        return data.decode("utf-8", errors="replace")

    return Tokenizer(
        name="bytes",
        vocab_size=256,
        end_id=0,
        digest=hashlib.sha256(b"utf-8 bytes, end 0").hexdigest(),
        encode=encode,
        decode=decode,
        find=lambda _: None,
    )


def _load_hugging_face(name: str, data: bytes, end_token: str | int | None) -> Tokenizer:
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"tokenizer {name!r} cannot be read: {error}.") from error
    # A document that merely quotes a special token must not end there.
    model.encode_special_tokens = True
    model.no_truncation()
    model.no_padding()

    def encode(text: str) -> np.ndarray:
        # The batched call is the fast one: it does not track offsets into the text.
        encodings = model.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encodings[0].ids, np.int64)

    return Tokenizer(
        name=name,
        vocab_size=1 + max(model.get_vocab(with_added_tokens=True).values()),
        end_id=_find_end(name, end_token, model.token_to_id, None),
        digest=hashlib.sha256(data).hexdigest(),
        encode=encode,
        decode=lambda tokens: model.decode(np.asarray(tokens).tolist()),
        find=model.token_to_id,
    )


def _load_sentencepiece(name: str, data: bytes, end_token: str | int | None) -> Tokenizer:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise UserError(f"tokenizer {name!r} cannot be read: {error}.") from error

    def find(token: str) -> int | None:
        index = model.PieceToId(token)
        return index if model.IdToPiece(index) == token else None

    return Tokenizer(
        name=name,
        vocab_size=model.GetPieceSize(),
        end_id=_find_end(name, end_token, find, model.eos_id()),
        digest=hashlib.sha256(data).hexdigest(),
        encode=lambda text: np.asarray(model.EncodeAsIds(text), np.int64),
        decode=lambda tokens: model.DecodeIds(np.asarray(tokens).tolist()),
        find=find,
    )


def _find_end(
    name: str,
    end_token: str | int | None,
    find: Callable[[str], int | None],
    declared: int | None,
) -> int:
    """Returns the id of the end token: the one asked for, declared, or usual."""
    if isinstance(end_token, int):
        return end_token
    if end_token is None and declared is not None and declared >= 0:
        return declared
    for token in END_TOKENS if end_token is None else (end_token,):
        if (index := find(token)) is not None:
            return index
    if end_token is not None:
        raise UserError(f"tokenizer {name!r} has no token {end_token!r}.")
    raise UserError(
        f"tokenizer {name!r} has none of the usual end tokens ({', '.join(END_TOKENS)}); "
        f"name the one it has with --end-token."
    )
