"""Training of byte-level BPE: the judges are plain Python."""

import collections
import itertools
import json
import random

import hypothesis
import hypothesis.strategies as st
import pytest
import regex
import tokenizers

from stackjax.runtime.errors import UserError
from stackjax.tokenizer import train_bpe as training
from stackjax.tokenizer.tokenizer import load_tokenizer
from stackjax.tokenizer.train_bpe import train_bpe

END = "<|endoftext|>"
SPECIAL = ("<s>", END)
TEXTS = [
    "def f(x):\n    return x + 1000000\n\n\n\tthe model doesn't grow; it DOESN'T train.\r\n",
    "the the then, they'll grow; naïve déjà vu 日本語 日本 🙂🙂 and 12345 12345 12345\n  \n x",
    f"it quotes {END} and {END}\0\0 and <s> twice: <s>\N{NO-BREAK SPACE} \u2028 é\u0301",
] * 3
# Words of Unicode letters with a mark before them, three digits, marks, white space.
MATCH = regex.compile(
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|[ ]?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def letters() -> list[str]:
    """Returns the letter of every byte in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


LETTERS = letters()


def words(text: str) -> list[tuple[str, ...]]:
    """Returns the matches in a text, as letters of bytes."""
    found = [match[0] for match in MATCH.finditer(text)]
    assert "".join(found) == text
    return [tuple(LETTERS[byte] for byte in word.encode()) for word in found]


def merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Returns a word after a merge, from left to right."""
    if word[:2] == pair:
        return ("".join(pair), *merged(word[2:], pair))
    return word and (word[0], *merged(word[1:], pair))


def judge_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Returns the most frequent pairs, one after the other; of equal ones the smallest ids."""
    ids = {letter: index for index, letter in enumerate(sorted(LETTERS))}
    counts = collections.Counter(word for text in texts for word in words(text))
    merges = []
    for _ in range(count):
        pairs = collections.Counter()
        for word, times in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        together = collections.Counter()
        for word, times in counts.items():
            together[merged(word, best)] += times
        counts = together
    return merges


def judge_ids(fields: dict, text: str) -> list[int]:
    """Returns the tokens of a text without special tokens, by merges in the order of ranks."""
    vocab, merges = fields["model"]["vocab"], [tuple(m) for m in fields["model"]["merges"]]
    ids = []
    for word in words(text):
        for pair in merges:
            word = merged(word, pair)
        ids += [vocab[token] for token in word]
    return ids


@pytest.fixture(scope="module")
def definition() -> str:
    return train_bpe(TEXTS, 340, SPECIAL)


@pytest.fixture(scope="module")
def model(definition) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(definition)


def test_merges_are_the_most_frequent_pairs(definition):
    fields = json.loads(definition)
    found = [tuple(merge) for merge in fields["model"]["merges"]]
    assert found == judge_merges(TEXTS, len(found)) and len(found) >= 340 - 258


def test_ids_are_special_tokens_then_bytes_then_merges(definition):
    fields = json.loads(definition)
    vocab = sorted(fields["model"]["vocab"], key=fields["model"]["vocab"].get)
    assert sorted(fields["model"]["vocab"].values()) == list(range(340))
    assert vocab[:2] == list(SPECIAL)
    assert vocab[2:258] == sorted(LETTERS)
    merges = dict.fromkeys("".join(merge) for merge in fields["model"]["merges"])
    assert vocab[258:] == list(merges)
    assert [(token["content"], token["special"]) for token in fields["added_tokens"]] == [
        (token, True) for token in SPECIAL
    ]


@pytest.mark.parametrize("text", [*TEXTS[:2], "", "\n\n x\n", "'LL 'll", "a\r\n\r\nb  c\t"])
def test_ids_match_plain_python(model, definition, text):
    ids = model.encode(text).ids
    assert ids == judge_ids(json.loads(definition), text)


@hypothesis.given(UNICODE)
def test_ids_of_any_text_match_plain_python(model, definition, text):
    hypothesis.assume(not any(token in text for token in SPECIAL))
    # Versions of Unicode differ in the letters above.
    hypothesis.assume(all(ord(character) < 0x800 for character in text))
    assert model.encode(text).ids == judge_ids(json.loads(definition), text)


@hypothesis.given(UNICODE)
def test_every_text_round_trips(model, text):
    assert model.decode(model.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(model):
    text = "".join(map(chr, range(0x800))) + "".join(map(chr, range(0xE000, 0x110000, 61)))
    ids = model.encode(text).ids
    assert model.decode(ids) == text
    assert {model.token_to_id(letter) for letter in LETTERS} == set(range(2, 258))


def test_quoted_special_tokens_are_text_in_documents(definition, tmp_path):
    (tmp_path / "t.json").write_text(definition)
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.end_id == 1 and tokenizer.vocab_size == 340
    assert (tokenizer.begin_ids, tokenizer.suffix_ids) == ((), ())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.min() >= 2
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_special(f"a{END}").tolist()[-1] == 1


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_order_and_chunks_of_the_texts_have_no_effect(definition, chunk, monkeypatch):
    monkeypatch.setattr(training, "CHUNK_CHARACTERS", chunk)
    texts = random.Random(chunk).sample(TEXTS, len(TEXTS))
    assert len(list(training.cut_text(TEXTS[0]))) > 1
    assert train_bpe(texts, 340, SPECIAL) == definition


@hypothesis.given(st.text("\n\r\t \u2028'as1.é\x1c", max_size=30), st.integers(1, 5))
def test_no_match_lies_in_two_chunks(text, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CHUNK_CHARACTERS", chunk)
        chunks = list(training.cut_text(text))
    assert "".join(chunks) == text
    assert [word for each in chunks for word in words(each)] == words(text)


def test_too_little_text_names_the_size_that_it_gives():
    with pytest.raises(
        UserError, match=r"for only \d+ entries; pass --vocab-size \d+, or"
    ) as e:
        train_bpe(TEXTS, 100_000, (END,))
    size = int(regex.search(r"--vocab-size (\d+)", str(e.value))[1])
    assert len(json.loads(train_bpe(TEXTS, size, (END,)))["model"]["vocab"]) == size
    with pytest.raises(UserError, match=f"only {size} entries"):
        train_bpe(TEXTS, size + 1, (END,))


def test_smallest_vocabulary_is_bytes():
    assert json.loads(train_bpe([], 257, (END,)))["model"]["merges"] == []
    with pytest.raises(UserError, match="vocab_size is 256; it must be at least 257"):
        train_bpe([], 256, (END,))
    with pytest.raises(UserError, match="vocab_size is 257; it must be at least 258"):
        train_bpe([], 257, SPECIAL)


@pytest.mark.parametrize(
    "token", ["the", "Ġthe", "x", "Ġ", "'ll", "12", "...", "Ã", "xÃ", "é", "Ċ", "<s"]
)
def test_special_token_that_may_be_text_is_refused(token):
    with pytest.raises(UserError, match="name it differently"):
        train_bpe([], 300, (token,))


@pytest.mark.parametrize(
    "token", [END, "<s>", "</s>", "<pad>", "[PAD]", "<\uff5cend\u2581of\uff5c>", "a b"]
)
def test_special_token_is_never_the_result_of_merges(token):
    texts = [f"x{token}y {token} {token}\n" * 20]
    size = int(regex.search(r"only (\d+)", error_of(texts, token))[1])
    fields = json.loads(train_bpe(texts, size, (token,)))
    assert token not in {"".join(merge) for merge in fields["model"]["merges"]}
    assert fields["model"]["vocab"][token] == 0


def error_of(texts: list[str], token: str) -> str:
    """Returns the message for too little text."""
    with pytest.raises(UserError) as error:
        train_bpe(texts, 100_000, (token,))
    return str(error.value)


def test_special_token_given_twice_is_refused():
    with pytest.raises(UserError, match="twice"):
        train_bpe([], 300, (END, "<s>", END))
