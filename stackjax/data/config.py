"""Where the sequences of a run come from."""

import dataclasses
from typing import Annotated, Literal

from stackjax.runtime.numbers import Text
from stackjax.runtime.ranges import Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where sequences come from."""

    path: Text
    """Directory of token shards, as `python -m stackjax.prepare` writes it; on a disk or in
    a bucket (`gs://`)."""
    cache_dir: Text | None = None
    """Directory on a local disk that shards are copied to before they are read, once for all
    processes of a host; by default they are read where they are."""
    seq_len: Annotated[int, Whole(at_least=2, at_most=2**24)]
    """Tokens in each sequence (T)."""
    corpus: Literal["stdlib"] | None = None
    """Built-in corpus that is prepared at `path` when nothing is there yet."""
    mask_documents: bool = False
    """Whether tokens attend, and are predicted, only within their own document."""
    num_workers: Annotated[int, Whole(at_least=0, at_most=1000)] = 0
    """Grain worker processes; 0 reads in threads of this process."""
    prefetch: Annotated[int, Whole(at_least=0, at_most=1000)] = 4
    """Batches read ahead of the train step."""
