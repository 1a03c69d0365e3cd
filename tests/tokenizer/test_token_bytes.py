"""The bytes of single tokens: the judge is the text itself."""

import pytest
from tokenizer_kinds import EOS, KINDS, TEXT, WORDS, write_kind

from stackjax.tokenizer.token_bytes import token_bytes
from stackjax.tokenizer.tokenizer import load_tokenizer

BYTE_LEVEL = ("bpe_with_merges", "bpe_ignoring_merges", "bpe_with_nonspecial_added_tokens")
WITH_FALLBACK = (
    "bpe_with_byte_fallback",
    "sentencepiece",
    "sentencepiece, bpe",
    "sentencepiece, user-defined end",
    "sentencepiece, no prefix",
)
TEXTS = ("", "a model", TEXT, "déjà vu: 日本\n\t\x1b \u2581 <0x41> \\", "  two  spaces ")


def load(kind: str, directory):
    return load_tokenizer("bytes" if kind == "bytes" else write_kind(kind, directory))


def spelled(tokenizer, text: str) -> list[bytes]:
    return list(map(token_bytes(tokenizer), tokenizer.encode(text).tolist()))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", *BYTE_LEVEL])
def test_bytes_of_tokens_are_those_of_the_text(tmp_path, kind, text):
    assert b"".join(spelled(load(kind, tmp_path), text)) == text.encode()


@pytest.mark.parametrize("text", [text.replace("\u2581", " ") for text in TEXTS])
@pytest.mark.parametrize("kind", WITH_FALLBACK)
def test_bytes_of_pieces_are_those_of_the_text_after_a_space(tmp_path, kind, text):
    found = b"".join(spelled(load(kind, tmp_path), text)).decode()
    assert found in (text, f" {text}")


def test_words_of_other_models_keep_their_names(tmp_path):
    text = " ".join(WORDS)
    assert spelled(load("word_level", tmp_path), text) == [word.encode() for word in WORDS]
    assert spelled(load("word_piece", tmp_path), "grows") == [
        b"g",
        b"##r",
        b"##o",
        b"##w",
        b"##s",
    ]
    unigram = b"".join(spelled(load("unigram", tmp_path), "a model that grows"))
    assert unigram == b" a model that grows"


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_end_token_has_a_name(tmp_path, kind):
    tokenizer = load(kind, tmp_path)
    expected = "<|endoftext|>" if kind == "bytes" else EOS
    assert token_bytes(tokenizer)(tokenizer.end_id) == expected.encode()


@pytest.mark.parametrize("kind", ["bytes", *BYTE_LEVEL, *WITH_FALLBACK])
def test_character_in_several_tokens_is_spelled_byte_by_byte(tmp_path, kind):
    assert spelled(load(kind, tmp_path), "é")[-2:] == [b"\xc3", b"\xa9"]


def test_id_without_a_token_shows_its_number(tmp_path):
    tokenizer = load("word_level", tmp_path)
    assert token_bytes(tokenizer)(99) == b"<99>"
