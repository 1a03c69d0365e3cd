"""What a checkpoint says of the state that it holds."""

import dataclasses
from typing import Any

from stackjax.checkpoint.lineage import Generation
from stackjax.files.json_file import Fields, decode, seal, unseal
from stackjax.files.rows_file import Extent
from stackjax.model.config import ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Counts


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint says of the state that it holds."""

    counts: Counts
    """What had been consumed."""
    model: ModelConfig
    is_model: bool
    """Whether the parameters are those that the model runs: not while a learned growth is
    fitted, and not until all masks are open."""
    lineage: tuple[Generation, ...]
    """Where the model comes from, itself last."""
    rows: Extent = dataclasses.field(default_factory=Extent)
    """The rows of the run's metrics up to this state."""


def to_json(contents: Contents) -> Fields:
    """Returns contents as plain values with a hash of them."""
    return seal(dataclasses.asdict(contents))


def from_json(fields: Any) -> Contents:
    """Returns the contents that `to_json` has made plain; UserError if they are damaged."""
    contents = decode(Contents, unseal(fields), "contents")
    if not contents.lineage:
        raise UserError("contents.lineage is empty")
    return contents
