"""The fields of a Hugging Face tokenizer.json: checks, hash, and changes.

Text in a document must never become a special token. `spell_out` therefore renames special
tokens to names absent from any text. The tokenizer then spells `</s>` with other tokens, like
an unknown word.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers

MAX_VOCAB = 2**22
"""Maximum number of ids; limits the memory use of a damaged file."""
BYTES_END = "<|endoftext|>"
"""Name of byte 0, the end token, in a tokenizer.json for bytes."""

Fields = Mapping[str, Any]


def parse(data: bytes) -> Fields:
    """Returns the fields of a tokenizer.json.

    Raises:
      ValueError: The file is not a tokenizer; the message has the reason.
    """
    try:
        fields = json.loads(data)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError("it has no model with a vocabulary")
    if not model["vocab"]:
        raise ValueError("its vocabulary is empty")
    return fields


def load(fields: Fields) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a tokenizer.json, without truncation and padding.

    Raises:
      ValueError: A field is invalid for the tokenizers library.
    """
    with _as_value_error():
        model = tokenizers.Tokenizer.from_str(json.dumps(fields))
    _check_template(fields.get("post_processor"))
    if _type(fields["model"]) in ("WordLevel", "WordPiece"):
        unknown = _unknown(fields["model"])
        if unknown not in fields["model"]["vocab"]:
            raise ValueError(f"its vocabulary lacks unk_token {unknown!r}")
    size = vocab_size(model)
    if not 0 < size <= MAX_VOCAB:
        raise ValueError(f"its largest id is {size - 1}; it may be at most {MAX_VOCAB - 1}")
    model.no_truncation()
    model.no_padding()
    return model


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    """Converts errors of the tokenizers library to ValueError."""
    try:
        yield
    except BaseException as error:
        # The library raises plain Exception, or PanicException, a BaseException.
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise ValueError(str(error)) from error
        raise


def _check_template(processor: Any) -> None:
    """Raises ValueError for a template with a special token without an id.

    The library panics on such a template at the first text.
    """
    if processor is None:
        return
    for inner in processor.get("processors") or ():
        _check_template(inner)
    known = processor.get("special_tokens") or {}
    for piece in (*(processor.get("single") or ()), *(processor.get("pair") or ())):
        token = piece.get("SpecialToken", {}).get("id")
        if token is not None and token not in known:
            raise ValueError(f"its post_processor has no id for {token!r}")


def vocab_size(model: tokenizers.Tokenizer) -> int:
    """Returns the largest id plus 1."""
    return 1 + max(model.get_vocab(with_added_tokens=True).values(), default=-1)


def affixes(model: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids before and after every text, from the template in the file.

    Raises:
      ValueError: The library cannot apply the template.
    """
    for text in ("a", *model.get_vocab()):
        with _as_value_error():
            encoding = model.encode(text)
        if not all(encoding.special_tokens_mask):
            inner = [i for i, mask in enumerate(encoding.special_tokens_mask) if not mask]
            ids = tuple(encoding.ids)
            return ids[: inner[0]], ids[inner[-1] + 1 :]
    return (), ()


def digest(fields: Fields) -> str:
    """Returns a SHA-256 of the fields that determine token ids.

    Formatting, key order, fields at default values, and the template around texts have no
    effect: the digest survives rewriting by another library.
    """
    model = {name: value for name, value in fields["model"].items() if value}
    model["type"] = _type(fields["model"])
    model["merges"] = [_pair(merge) for merge in model.get("merges", ())]
    added = sorted(_added(fields), key=lambda token: token["id"])
    parts = [model, fields.get("normalizer"), fields.get("pre_tokenizer"), added]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _type(model: Fields) -> str:
    """Returns the model type; older files do not record a type."""
    if isinstance(model["vocab"], list):
        return "Unigram"
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def with_special_tokens(fields: Fields, tokens: Iterable[str], first: int) -> Fields:
    """Returns the fields with more special tokens, with ids from `first` upward."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": first + i, "content": token, **flags, "special": True}
        for i, token in enumerate(tokens)
    ]
    return {**fields, "added_tokens": [*_added(fields), *added]}


def special_tokens(fields: Fields) -> set[str]:
    """Returns the special added tokens, except the unknown token."""
    special = {token["content"] for token in _added(fields) if token.get("special")}
    return {token for token in special if token != _unknown(fields["model"])}


def unknown_ids(fields: Fields, model: tokenizers.Tokenizer) -> set[int]:
    """Returns the id of the unknown token, or an empty set."""
    unknown = _unknown(fields["model"])
    index = None if unknown is None else model.token_to_id(unknown)
    return set() if index is None else {index}


def spell_out(fields: Fields, tokens: Iterable[str]) -> Fields:
    """Returns the fields of a tokenizer that never encodes text as the given tokens.

    Text such as `</s>` is spelled with other tokens. If the vocabulary has no other tokens for
    the text, it becomes the unknown token, or nothing. All ids stay the same.
    """
    suffix = digest(fields)  # Makes names absent from any text.
    unknown = _unknown(fields["model"])  # The library needs the unknown token's name.
    names = {token: f"{token}\0{suffix}" for token in tokens if token != unknown}
    added = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in _added(fields)
    ]
    model = _rename(fields["model"], names)
    return {**fields, "model": model, "added_tokens": added, "post_processor": None}


def _rename(model: Fields, names: Mapping[str, str]) -> Fields:
    """Returns a model with renamed tokens, without merges from or to these tokens."""
    if isinstance(model["vocab"], list):
        vocab = [[names.get(token, token), score] for token, score in model["vocab"]]
        return {**model, "vocab": vocab}
    vocab = {names.get(token, token): index for token, index in model["vocab"].items()}
    if "merges" not in model:
        return {**model, "vocab": vocab}
    prefix = model.get("continuing_subword_prefix") or ""
    merges = [
        [left, right]
        for left, right in map(_pair, model["merges"])
        if names.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
    ]
    return {**model, "vocab": vocab, "merges": merges}


def _pair(merge: Any) -> list[str]:
    """Returns a merge as a pair; older files store a string."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _added(fields: Fields) -> list[dict[str, Any]]:
    return fields.get("added_tokens") or []


def _unknown(model: Fields) -> str | None:
    """Returns the unknown token, or None."""
    if isinstance(model["vocab"], list):
        index = model.get("unk_id")
        return None if index is None else model["vocab"][index][0]
    return model.get("unk_token")


def bytes_fields() -> Fields:
    """Returns a tokenizer.json for UTF-8 bytes; byte 0, the end token, is special."""
    letters = byte_letters()
    vocabulary = {letter: byte for byte, letter in enumerate([BYTES_END, *letters[1:]])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([BYTES_END])
    return json.loads(model.to_str())


def byte_letters() -> list[str]:
    """Returns the letter for each byte in the names of byte-level tokens, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))  # for unprintable bytes
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
