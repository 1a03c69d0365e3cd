"""The options of `data`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from stackjax.runtime.constraints import Checked
from stackjax.runtime.numbers import Text
from stackjax.runtime.ranges import Length, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataViewConfig(Checked):
    """Shows a data set; or, with --config, the data that a run reads."""

    directory: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Directory with token shards from `prepare`, on a disk or in a bucket (`gs://`). Leave it
    out with --config."""
    config: Path | None = None
    """Config file of a run instead of DIR. Other options then are --json and fields of the
    config."""
    compare_with: Annotated[tuple[Text, ...], Length(at_least=0, at_most=1000)] = ()
    """Other data sets; the numbers of documents shared with each are shown."""
    examples: Annotated[int, Whole(at_least=0, at_most=1000)] = 3
    """Number of training documents to show, spread evenly over the split."""
    picture: Path | None = None
    """PNG file to write, with a histogram of the lengths of training documents."""
    json: Path | None = None
    """JSON file to write, with all numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunDataConfig(Checked):
    """The data that a run reads."""

    json: Path | None = None
    """JSON file to write, with all numbers."""
