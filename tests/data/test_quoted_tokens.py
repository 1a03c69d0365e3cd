"""Special tokens quoted in documents are encoded as plain text."""

import functools
import json
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from tokenizer_kinds import BOS, EOS, JSON_NAMES, KINDS, TEXT, TURN, write_kind

from stackjax.data.config import PrepareConfig
from stackjax.data.prepare import prepare
from stackjax.data.sources import TokenSource
from stackjax.tokenizer.tokenizer import Tokenizer, load_tokenizer

# The second last part becomes the end token by NFKC normalization.
PARTS = ("<unk>", "</", "s>", " ", "\n", "a", "model", "é", "\uff1c/s\uff1e", "x")
QUOTES = (BOS, EOS, TURN, *PARTS)
quoting = st.lists(st.sampled_from(QUOTES), max_size=8).map("".join)


@functools.cache
def loaded(kind: str, begins: bool = False) -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return load_tokenizer(write_kind(kind, Path(directory), begins))


def special_ids(kind: str) -> set[int]:
    """Returns the ids allowed only at the start or end of a document."""
    tokenizer = loaded(kind)
    # User-defined SentencePiece symbols may occur in texts, except the end token.
    names = [] if kind == "sentencepiece, user-defined end" else [BOS]
    names += [TURN] if kind in JSON_NAMES else []
    return {tokenizer.end_id, *map(tokenizer.find, names)}


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(text=quoting)
def test_text_never_encodes_to_special_tokens(kind, text):
    tokens = loaded(kind).encode(text)
    assert special_ids(kind).isdisjoint(tokens.tolist())
    assert np.issubdtype(tokens.dtype, np.integer)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "word" not in kind])
@pytest.mark.parametrize("quote", [EOS, f"x{EOS}y", f"{EOS} {EOS}", f"{BOS}a{EOS}"])
def test_quoted_token_is_spelled_with_other_tokens(kind, quote):
    tokenizer = loaded(kind)
    assert tokenizer.decode(tokenizer.encode(quote)).strip() == quote


@pytest.mark.parametrize(
    ("kind", "spelled"),
    [
        ("word_level", ["a", "<unk>", "model"]),
        ("word_level_with_unknown_as_end", ["a", "model"]),
        ("word_piece", ["a", "<", "##/", "##s", "##>", "m", "##o", "##d", "##e", "##l"]),
    ],
)
def test_unspellable_quoted_token_is_unknown_or_dropped(kind, spelled):
    tokenizer = loaded(kind)
    tokens = tokenizer.encode(f"a {EOS} model").tolist()
    assert tokens == [tokenizer.find(token) for token in spelled]


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "word_level_with_unknown_as_end"]
)
def test_text_without_quotes_is_encoded_by_the_library(kind):
    tokenizer, text = loaded(kind), "a model that grows while it trains"
    assert tokenizer.encode(text).tolist() == tokenizer.encode_special(text).tolist()


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "sentencepiece, user-defined end"]
)
def test_prompts_may_contain_special_tokens(kind):
    tokenizer = loaded(kind)
    tokens = tokenizer.encode_special(f"a {BOS} a{EOS}").tolist()
    assert tokens.count(tokenizer.find(BOS)) == 1
    assert tokens[-1] == tokenizer.find(EOS)


@pytest.mark.parametrize(
    ("kind", "begins"),
    [*((kind, False) for kind in KINDS), *((kind, True) for kind in JSON_NAMES)],
)
def test_data_set_has_one_end_token_per_document(kind, begins, tmp_path):
    name = write_kind(kind, tmp_path, begins)
    texts = [EOS, TEXT, f"a{EOS}", f"{EOS}a", f"{BOS} a", f"a {TURN} {EOS}{EOS} a", "a"]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = prepare(
        PrepareConfig(
            paths=(str(data), str(tmp_path / "set")),
            tokenizer=name,
            validation_fraction=0.0,
            num_processes=1,
        )
    )
    split, tokenizer = manifest.splits["train"], loaded(kind, begins)
    stream = TokenSource(str(tmp_path / "set"), "train", split.tokens)[0]
    ends = np.flatnonzero(stream == tokenizer.end_id)
    assert len(ends) == split.documents >= 4
    assert ends[-1] == len(stream) - 1
    assert tokenizer.begin_ids == (tokenizer.find(BOS),) * begins
    starts = [0, *(ends[:-1] + 1)]
    assert [tuple(stream[start:][:begins]) for start in starts] == [
        tokenizer.begin_ids for _ in starts
    ]
    others = special_ids(kind) - {tokenizer.end_id}
    assert np.isin(stream, list(others)).sum() == split.documents * begins


@pytest.mark.parametrize("kind", KINDS)
def test_unpaired_surrogate_is_refused(kind):
    for encode in (loaded(kind).encode, loaded(kind).encode_special):
        with pytest.raises(ValueError, match=r"U\+DCFF at character 2"):
            encode("ab\udcff")
