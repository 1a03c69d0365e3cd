"""The bytes of single tokens: a token may be part of a UTF-8 character."""

import json
import re
from collections.abc import Callable
from typing import Any

from stackjax.tokenizer import sentencepiece_model, tokenizer_json
from stackjax.tokenizer.tokenizer import Tokenizer

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""The space in names of tokens."""

TokenBytes = Callable[[int], bytes]
"""Returns the bytes of a token; the name for special tokens and for unknown ids."""


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """Returns a function from a token to its bytes."""
    if tokenizer.definition is None:
        end = tokenizer.written(tokenizer.end_id).encode()
        return lambda token: end if token == tokenizer.end_id else bytes([token])
    if tokenizer.file == "tokenizer.model":
        return _of_sentencepiece(tokenizer.definition)
    return _of_json(tokenizer.definition)


def _of_sentencepiece(definition: bytes) -> TokenBytes:
    model = sentencepiece_model.load(definition)

    def of_token(token: int) -> bytes:
        name = model.IdToPiece(token)
        if model.IsByte(token):
            return _from_name(name)
        is_special = model.IsControl(token) or model.IsUnknown(token)
        return (name if is_special else name.replace(_SPACE, " ")).encode()

    return of_token


def _of_json(definition: bytes) -> TokenBytes:
    fields = tokenizer_json.parse(definition)
    model = tokenizer_json.load(fields)
    added = {token["id"] for token in fields.get("added_tokens") or ()}
    read = _reader(fields.get("decoder"))

    def of_token(token: int) -> bytes:
        name = model.id_to_token(token)
        if name is None:
            return f"<{token}>".encode()
        return name.encode() if token in added else read(name)

    return of_token


def _reader(decoder: Any) -> Callable[[str], bytes]:
    """Returns a function from a token's name to its bytes, for a decoder in tokenizer.json."""
    steps = decoder.get("decoders", [decoder]) if decoder else []
    if any(step["type"] == "ByteLevel" for step in steps):
        byte_of = {letter: byte for byte, letter in enumerate(tokenizer_json.byte_letters())}

        def read(name: str) -> bytes:
            is_known = byte_of.keys() >= set(name)
            return bytes(map(byte_of.__getitem__, name)) if is_known else name.encode()

        return read
    if _SPACE in json.dumps(decoder, ensure_ascii=False):
        return lambda name: _from_name(name.replace(_SPACE, " "))
    return _from_name


def _from_name(name: str) -> bytes:
    """Returns the byte that a name such as `<0xC3>` stands for, else the name."""
    byte = _BYTE.fullmatch(name)
    return bytes.fromhex(byte[1]) if byte else name.encode()
