"""Tokenizers: bytes, a Hugging Face `tokenizer.json`, or a SentencePiece `.model`."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from stackjax.files.storage import check_bucket
from stackjax.runtime.errors import UserError
from stackjax.tokenizer import sentencepiece_model, tokenizer_json

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
"""Common names for the token between documents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer: text to tokens and back.

    A document is `begin_ids`, the tokens of the text, and `end_id`. A document's text never
    becomes a special token: a quoted `</s>` is spelled with other tokens.
    """

    name: str
    """`bytes`, or the tokenizer's path."""
    vocab_size: int
    """Upper bound of the ids: every id is below."""
    begin_ids: tuple[int, ...] = ()
    """Tokens before every document and prompt; usually empty or the BOS."""
    end_id: int
    """The token that ends a document."""
    suffix_ids: tuple[int, ...] = ()
    """Tokens after a task text, from the template in the file."""
    digest: str
    """SHA-256 over everything that determines token ids, except `begin_ids`."""
    file: str | None = None
    """File name in a data set or run directory; None for bytes."""
    definition: bytes | None = None
    """Contents of this file."""
    encode: Callable[[str], np.ndarray]
    """Returns the tokens of a document's text, integers [T] without special tokens."""
    encode_special: Callable[[str], np.ndarray]
    """Returns the tokens of a prompt; `</s>` becomes the special token."""
    decode: Callable[[Sequence[int]], str]
    """Returns the text of tokens, without special tokens and unknown ids."""
    find: Callable[[str], int | None]
    """Returns the id of a special token such as `</s>`; None if missing."""
    written: Callable[[int], str]
    """Returns the name of a special token, such as `</s>`."""


def load_tokenizer(
    name: str,
    end_token: str | int | None = None,
    *,
    special: Collection[str | int] = (),
    added: Collection[str] = (),
) -> Tokenizer:
    """Returns the tokenizer `bytes`, or the tokenizer in a `.json` or `.model` file.

    Args:
      name: `bytes` or a path, possibly in a bucket.
      end_token: The token at the end of documents, by name or id; default from `END_TOKENS`.
      special: More tokens, by name or id, to keep out of documents.
      added: Special tokens to add, with the next ids, if a `.json` file lacks them.

    Raises:
      UserError: The file is not a tokenizer, or has no end token.
      OSError: The bucket is not usable.
    """
    if name == "bytes":
        if end_token is not None:
            raise UserError(
                f"end token is {end_token!r}, but the tokenizer 'bytes' always ends documents "
                f"with byte 0; leave it out."
            )
        return _bytes_tokenizer()
    check_bucket(name)
    path = epath.Path(name)
    if not path.exists() or path.is_dir():
        raise UserError(
            f"tokenizer {name!r} is not a file; give 'bytes', or a path to a Hugging "
            f"Face tokenizer.json or to a SentencePiece .model."
        )
    if path.suffix not in (".json", ".model"):
        raise UserError(
            f"tokenizer {name!r} ends in neither .json (Hugging Face) nor .model "
            f"(SentencePiece), so its format is unknown; rename the file."
        )
    try:
        if path.suffix == ".json":
            return _load_json(name, path.read_bytes(), end_token, special, added)
        return _load_sentencepiece(name, path.read_bytes(), end_token, special)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"tokenizer {name!r} cannot be read: {error}.") from error


def _bytes_tokenizer() -> Tokenizer:
    """Returns UTF-8 bytes as tokens; byte 0 ends documents and is dropped from text."""

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8").replace(b"\0", b""), np.uint8)

    def decode(tokens: Sequence[int]) -> str:
        data = np.asarray(tokens, np.int64)
        data = data[(data > 0) & (data < 256)].astype(np.uint8)
        return data.tobytes().decode("utf-8", errors="replace")

    return Tokenizer(
        name="bytes",
        vocab_size=256,
        end_id=0,
        digest=_bytes_digest(),
        encode=_with_unicode_check(encode),
        encode_special=_with_unicode_check(encode),
        decode=decode,
        find={tokenizer_json.BYTES_END: 0}.get,
        written=lambda _: tokenizer_json.BYTES_END,
    )


@functools.cache
def _bytes_digest() -> str:
    # A Hugging Face folder exported from bytes has the same digest.
    return tokenizer_json.digest(tokenizer_json.bytes_fields())


def _load_json(
    name: str,
    data: bytes,
    end_token: str | int | None,
    special: Collection[str | int],
    added: Collection[str],
) -> Tokenizer:
    fields = tokenizer_json.parse(data)
    model = tokenizer_json.load(fields)
    size = tokenizer_json.vocab_size(model)
    missing = [token for token in added if model.token_to_id(token) is None]
    if missing:
        fields = tokenizer_json.with_special_tokens(fields, missing, size)
        model, data = tokenizer_json.load(fields), json.dumps(fields).encode()
        size = tokenizer_json.vocab_size(model)
    begin_ids, suffix_ids = tokenizer_json.affixes(model)
    end_id = _find_end(name, size, end_token, model.token_to_id, None)
    _check_ids(name, size, "template", (*begin_ids, *suffix_ids))

    def written(token: int) -> str:
        return model.decode([token], skip_special_tokens=False)

    more = _known_ids(special, size, model.token_to_id)
    ids = {end_id, *begin_ids, *(more - tokenizer_json.unknown_ids(fields, model))}
    names = set(filter(None, map(model.id_to_token, ids)))
    names |= tokenizer_json.special_tokens(fields)
    ids |= {index for token in names if (index := model.token_to_id(token)) is not None}
    return Tokenizer(
        name=name,
        vocab_size=size,
        begin_ids=begin_ids,
        end_id=end_id,
        suffix_ids=suffix_ids,
        digest=tokenizer_json.digest(fields),
        file="tokenizer.json",
        definition=data,
        encode=_encode_documents(fields, names, _mask(ids, size)),
        encode_special=_with_unicode_check(functools.partial(_encode, model)),
        decode=lambda tokens: model.decode(np.asarray(tokens).tolist()),
        find=model.token_to_id,
        written=written,
    )


def _known_ids(
    tokens: Iterable[str | int], size: int, find: Callable[[str], int | None]
) -> set[int]:
    """Returns the ids of tokens, without tokens outside the vocabulary."""
    ids = {find(token) if isinstance(token, str) else token for token in tokens}
    return {index for index in ids if index is not None and 0 <= index < size}


def _encode(model: tokenizers.Tokenizer, text: str) -> np.ndarray:
    try:
        # Faster than `encode`, without character offsets.
        encodings = model.encode_batch_fast([text], add_special_tokens=False)
    except Exception as error:
        if type(error) is not Exception:  # The library raises plain Exception.
            raise
        raise UserError(f"the tokenizer cannot read a text: {error}.") from error
    return np.asarray(encodings[0].ids, np.int64)


def _encode_documents(
    fields: tokenizer_json.Fields, special: Collection[str], is_special_V: np.ndarray
) -> Callable[[str], np.ndarray]:
    """Returns a function that encodes text without special tokens."""

    @functools.cache
    def load() -> tokenizers.Tokenizer:
        plain = tokenizer_json.load(tokenizer_json.spell_out(fields, special))
        plain.encode_special_tokens = True
        return plain

    def encode(text: str) -> np.ndarray:
        # The unknown token cannot be renamed, so remove its id if the token is special too.
        return _without(_encode(load(), text), is_special_V)

    return _with_unicode_check(encode)


def _mask(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Returns a mask over the vocabulary, true for the ids, [V]."""
    mask_V = np.zeros(vocab_size, bool)
    mask_V[list(ids)] = True
    return mask_V


def _without(tokens_T: np.ndarray, is_special_V: np.ndarray) -> np.ndarray:
    """Returns tokens without special tokens."""
    is_special_T = is_special_V[tokens_T]
    return tokens_T[~is_special_T] if is_special_T.any() else tokens_T


def _with_unicode_check(encode: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Returns an encoder that raises UserError for text with unpaired surrogates."""

    def checked(text: str) -> np.ndarray:
        try:
            return encode(text)
        except (UnicodeEncodeError, TypeError, RuntimeError) as error:
            # The tokenizer libraries raise errors of different types.
            half = re.search("[\ud800-\udfff]", text)
            if half is None:
                raise
            raise UserError(
                f"a text has U+{ord(half[0]):04X} at character {half.start()}, an unpaired "
                f"surrogate, perhaps from a byte that is not UTF-8; fix the text."
            ) from error

    return checked


def _load_sentencepiece(
    name: str, data: bytes, end_token: str | int | None, special: Collection[str | int]
) -> Tokenizer:
    model = sentencepiece_model.load(data)
    size = model.GetPieceSize()

    def find(token: str) -> int | None:
        index = model.PieceToId(token)
        return index if model.IdToPiece(index) == token else None

    decoder = sentencepiece_model.decoder(data)

    def decode(tokens: Sequence[int]) -> str:
        known = (token for token in np.asarray(tokens).tolist() if 0 <= token < size)
        return decoder.decode(
            [
                model.IdToPiece(token)
                for token in known
                if not (model.IsControl(token) or model.IsUnknown(token))
            ]
        )

    end_id = _find_end(name, size, end_token, find, model.eos_id())
    special_ids = {end_id, *_known_ids((*special, model.bos_id()), size, find)}
    plain = sentencepiece_model.load(sentencepiece_model.spell_out(data, special_ids))
    is_special_V = _mask(special_ids - {model.unk_id()}, size)

    def encode(text: str) -> np.ndarray:
        return _without(np.asarray(plain.EncodeAsIds(text), np.int64), is_special_V)

    return Tokenizer(
        name=name,
        vocab_size=size,
        end_id=end_id,
        digest=hashlib.sha256(data).hexdigest(),
        file="tokenizer.model",
        definition=data,
        encode=_with_unicode_check(encode),
        encode_special=_with_unicode_check(_encode_pieces(model, data, special_ids)),
        decode=decode,
        find=find,
        written=model.IdToPiece,
    )


def _encode_pieces(
    model: sentencepiece.SentencePieceProcessor, data: bytes, special: Collection[int]
) -> Callable[[str], np.ndarray]:
    """Returns an encoder that turns the names of special pieces into their ids.

    Special pieces are the control pieces, the unknown piece, and the ids in `special`. As in
    transformers, no space is added before a text with a leading space, nor after a special
    piece.
    """
    inner = sentencepiece_model.load(sentencepiece_model.without_prefix(data))
    controls = filter(model.IsControl, range(model.GetPieceSize()))
    indices = {*controls, *special, model.unk_id()}
    control = {model.IdToPiece(index): index for index in indices}
    longest_first = sorted(control, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def tokens(text: str) -> Iterator[int]:
        for i, part in enumerate(pattern.split(text)):
            if part in control:
                yield control[part]
            else:
                reader = inner if i or part.startswith(" ") else model
                yield from reader.EncodeAsIds(part)

    return lambda text: np.fromiter(tokens(text), np.int64)


def _find_end(
    name: str,
    vocab_size: int,
    end_token: str | int | None,
    find: Callable[[str], int | None],
    declared: int | None,
) -> int:
    """Returns the id of the end token: `end_token`, else `declared`, else from `END_TOKENS`."""
    if isinstance(end_token, int):
        _check_ids(name, vocab_size, "end token", [end_token])
        return end_token
    if end_token is None and declared is not None and declared >= 0:
        return declared
    for token in END_TOKENS if end_token is None else (end_token,):
        if (index := find(token)) is not None:
            return index
    if end_token is not None:
        raise UserError(f"tokenizer {name!r} has no token {end_token!r}.")
    raise UserError(
        f"tokenizer {name!r} has none of the common end tokens ({', '.join(END_TOKENS)}); "
        f"name its end token with --end-token."
    )


def _check_ids(name: str, vocab_size: int, what: str, ids: Iterable[int]) -> None:
    """Raises UserError for an id outside the vocabulary."""
    for index in ids:
        if not 0 <= index < vocab_size:
            raise UserError(
                f"the {what} of tokenizer {name!r} is {index}, and its vocabulary has the "
                f"ids 0 to {vocab_size - 1}."
            )
