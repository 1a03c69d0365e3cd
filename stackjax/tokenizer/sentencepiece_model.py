"""SentencePiece models: loading and changes to special pieces and the space prefix."""

from collections.abc import Iterable
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders

from stackjax.tokenizer.tokenizer_json import MAX_VOCAB

_PROTO: Any = sentencepiece_model_pb2  # Type checkers do not see the generated classes.


def load(data: bytes) -> sentencepiece.SentencePieceProcessor:
    """Returns the processor for a model file.

    Raises:
      ValueError: The file is damaged; the message has the reason.
    """
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if not 0 < model.GetPieceSize() <= MAX_VOCAB:
        raise ValueError(f"it has {model.GetPieceSize()} pieces; it may have 1 to {MAX_VOCAB}")
    return model


def spell_out(data: bytes, ids: Iterable[int]) -> bytes:
    """Returns a model that never encodes text as the pieces with these ids."""
    model = _PROTO.ModelProto.FromString(data)
    for index in ids:
        piece = model.pieces[index]
        if piece.type in (piece.NORMAL, piece.USER_DEFINED):
            piece.type = piece.CONTROL
    return model.SerializeToString()


def without_prefix(data: bytes) -> bytes:
    """Returns a model that adds no space before a text."""
    model = _PROTO.ModelProto.FromString(data)
    model.normalizer_spec.add_dummy_prefix = False
    return model.SerializeToString()


def decoder(data: bytes) -> decoders.Decoder:
    """Returns the decoder in transformers: bytes decode as UTF-8, invalid bytes as U+FFFD."""
    steps: list[Any] = [decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " ")]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if _PROTO.ModelProto.FromString(data).normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
