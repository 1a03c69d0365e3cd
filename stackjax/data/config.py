"""Data config."""

import dataclasses
from typing import Annotated, Literal

from stackjax.runtime.numbers import Text
from stackjax.runtime.ranges import Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, sequence length, and reading options."""

    path: Text
    """Directory with token shards from `python -m stackjax.prepare`, on a disk or in a bucket
    (`gs://`)."""
    cache_dir: Text | None = None
    """Local directory for copies, shared by all processes on a host; None reads shards directly
    from `path`."""
    seq_len: Annotated[int, Whole(at_least=2, at_most=2**24)]
    """Tokens in each sequence (T)."""
    corpus: Literal["stdlib"] | None = None
    """Built-in corpus, prepared at `path` if `path` does not exist."""
    mask_documents: bool = False
    """Whether attention and predictions stay within a document."""
    num_workers: Annotated[int, Whole(at_least=0, at_most=1000)] = 0
    """Grain worker processes; 0 reads in threads."""
    prefetch: Annotated[int, Whole(at_least=0, at_most=1000)] = 4
    """Batches to prefetch."""
