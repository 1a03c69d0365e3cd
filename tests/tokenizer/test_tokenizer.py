"""Tokenizers: round trips, vocabulary, digests and end tokens."""

import io
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers

from stackjax.tokenizer.tokenizer import load_tokenizer

TEXT = "def f(x):\n    return x + 1\n\nThe quick brown fox: 1234, déjà vu.\n" * 20


def write_hugging_face(path: Path, special_tokens: list[str]) -> str:
    """Trains a byte-level BPE with a few hundred tokens and returns the path."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TEXT], trainer)
    # Many published tokenizers have a template; encoding must ignore templates.
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special_tokens[0]} $A", special_tokens=[(special_tokens[0], 0)]
    )
    model.save(str(path))
    return str(path)


def write_sentencepiece(path: Path, **options) -> str:
    """Trains a unigram model with byte fallback and returns the path."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("tokenizers")
    return {
        "bytes": "bytes",
        "hugging_face": write_hugging_face(
            directory / "tokenizer.json", ["<s>", "<|endoftext|>"]
        ),
        "sentencepiece": write_sentencepiece(directory / "a.model"),
    }


@pytest.fixture(params=["bytes", "hugging_face", "sentencepiece"])
def tokenizer(request, names):
    return load_tokenizer(names[request.param])


@pytest.mark.parametrize("text", ["hello world", TEXT, "naïve 日本 🙂\ttabs\r\n", ""])
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_are_below_vocab_size_without_end_token(tokenizer):
    ids = tokenizer.encode(TEXT + "日本 </s> <|endoftext|> <s>")
    assert ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert 0 <= tokenizer.end_id < tokenizer.vocab_size
    assert tokenizer.end_id not in ids


def test_encode_adds_no_tokens(tokenizer):
    apart = np.concatenate([tokenizer.encode("a\n"), tokenizer.encode("b\n")])
    assert tokenizer.decode(apart) == "a\nb\n"
    assert len(tokenizer.encode("")) == 0


def test_digest_depends_only_on_the_definition(names, tmp_path):
    digests = {load_tokenizer(name).digest for name in names.values()}
    assert len(digests) == 3
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(names["hugging_face"]).read_bytes())
    assert load_tokenizer(str(copy)).digest in digests


@hypothesis.given(st.text())
def test_bytes_tokens_are_utf8_without_nul(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 256
    assert tokenizer.end_id == 0 and 0 not in ids
    assert tokenizer.decode(ids) == text.replace("\0", "")


@pytest.mark.parametrize("end", ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"])
def test_common_end_tokens_are_found(tmp_path, end):
    name = write_hugging_face(tmp_path / "t.json", ["<s>", end])
    assert load_tokenizer(name).end_id == 1


def test_uncommon_end_token_must_be_named(tmp_path):
    name = write_hugging_face(tmp_path / "t.json", ["<s>", "<done>"])
    with pytest.raises(ValueError, match="--end-token"):
        load_tokenizer(name)
    assert load_tokenizer(name, "<done>").end_id == 1
    with pytest.raises(ValueError, match="has no token '<nix>'"):
        load_tokenizer(name, "<nix>")


def test_sentencepiece_without_eos_requires_an_end_token(tmp_path):
    name = write_sentencepiece(tmp_path / "t.model", eos_id=-1, user_defined_symbols=["<done>"])
    with pytest.raises(ValueError, match="--end-token"):
        load_tokenizer(name)
    tokenizer = load_tokenizer(name, "<done>")
    assert 0 <= tokenizer.end_id < tokenizer.vocab_size


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("absent.json", None, "is not a file"),
        ("a.txt", b"", "format is unknown"),
        ("a.json", b"{}", "cannot be read"),
        ("a.json", b"\xff", "cannot be read"),
        ("a.model", b"junk", "cannot be read"),
        ("a.model", b"", "cannot be read"),
    ],
)
def test_unreadable_file_is_named(tmp_path, file, content, message):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(str(path))
    assert file in str(error.value)


def test_bytes_tokenizer_refuses_an_end_token():
    with pytest.raises(ValueError, match="leave it out"):
        load_tokenizer("bytes", "</s>")
