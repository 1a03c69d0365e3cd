"""Training of a byte-level BPE tokenizer."""

import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from stackjax.runtime.errors import UserError

# The pattern of GPT-4 and Llama 3: contractions, words with the mark before them, up to three
# digits, other marks, and white space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MIN_COUNT = 2
"""A pair of tokens is merged only if the texts have the pair this often."""
CHUNK_CHARACTERS = 2**16
# The end of a match, whatever comes before and after.
_CUT = re.compile(r"\n(?=\S)|[A-Za-z](?= [A-Za-z])")


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> str:
    """Returns a tokenizer.json, a pure function of the texts; their order has no effect.

    The ids are those of the special tokens, the 256 bytes, and the merges. Every text is
    decoded exactly. A special token in a text counts as any other text.

    Args:
      vocab_size: Number of entries, special tokens included.

    Raises:
      UserError: The texts give fewer entries, or `check_vocabulary` fails.
    """
    check_vocabulary(vocab_size, special_tokens)
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chunks = (chunk for text in texts for chunk in cut_text(text))
    tokenizer.train_from_iterator(chunks, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size}, but the text has pairs of tokens that occur "
            f"{MIN_COUNT} times for only {found} entries; pass --vocab-size {found}, or give "
            f"more text."
        )
    assert found == vocab_size, (found, vocab_size)
    return tokenizer.to_str(pretty=True) + "\n"


def check_vocabulary(vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raises UserError for too small a vocabulary, or for a wrong special token."""
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise UserError(
            f"vocab_size is {vocab_size}; it must be at least {least}, for 256 bytes and "
            f"{len(special_tokens)} special tokens."
        )
    for index, token in enumerate(special_tokens):
        if token in special_tokens[:index]:
            raise UserError(f"special_tokens has {token!r} twice; leave one of them out.")
        if _may_be_text(token):
            raise UserError(
                f"special_tokens has {token!r}, which may also become the token of a usual "
                f"text; name it differently, such as '<|name|>'."
            )


def cut_text(text: str) -> Iterator[str]:
    """Yields the text in chunks, with the same tokens as the text.

    The library needs many bytes of memory per character of a chunk. A text without line ends
    and without words in ASCII is a single chunk.
    """
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        found = _CUT.search(text, start + CHUNK_CHARACTERS)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _may_be_text(token: str) -> bool:
    """Returns whether merges may result in the name of a special token.

    A byte-level vocabulary writes each byte as a letter. ASCII letters are written as they
    are, and no merge crosses the border of two matches.
    """
    if not set(token) <= set(pre_tokenizers.ByteLevel.alphabet()):
        return False
    pieces = pre_tokenizers.Split(Regex(PATTERN), "isolated").pre_tokenize_str(token)
    return not token.isascii() or len(pieces) == 1
