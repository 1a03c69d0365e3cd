"""Synthetic token shards."""

import hashlib
from pathlib import Path

import numpy as np

from stackjax.data.manifest import Manifest, Split, write_manifest
from stackjax.data.shards import ShardWriter
from stackjax.data.sources import TokenSource
from stackjax.tokenizer.tokenizer_info import TokenizerInfo

SYNTHETIC_TOKENS = 2**23
END_ID = 0


def write_synthetic(
    directory: Path, vocab_size: int, seq_len: int, *, name: str = "data", seed: int = 0
) -> TokenSource:
    """Writes token shards with random documents into a directory, and opens them.

    The lengths of documents are log-normal, with a mean of 664 tokens.
    """
    directory.mkdir(exist_ok=True)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    writer, rng = ShardWriter(directory / "synthetic.train", dtype), np.random.default_rng(seed)
    lengths = _document_lengths(rng)
    tokens = rng.integers(END_ID + 1, vocab_size, lengths.sum())
    tokens[np.cumsum(lengths) - 1] = END_ID
    writer.write(tokens, lengths)
    shard = writer.close()
    tokenizer = TokenizerInfo(
        name="synthetic",
        digest=hashlib.sha256(b"synthetic").hexdigest(),
        vocab_size=vocab_size,
        end_id=END_ID,
    )
    stream = Split(tokens=shard.tokens, documents=len(lengths), shards=(shard,))
    write_manifest(
        str(directory), Manifest(tokenizer=tokenizer, dtype=dtype, splits={"train": stream})
    )
    return TokenSource(str(directory), "train", seq_len, name=name)


def _document_lengths(rng: np.random.Generator) -> np.ndarray:
    """Returns random token counts that sum to `SYNTHETIC_TOKENS`."""
    lengths = np.ceil(rng.lognormal(6.0, 1.0, SYNTHETIC_TOKENS // 256)).astype(np.int64)
    ends = np.minimum(np.cumsum(lengths), SYNTHETIC_TOKENS)
    return np.diff(ends[: np.searchsorted(ends, SYNTHETIC_TOKENS) + 1], prepend=0)
