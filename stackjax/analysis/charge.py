"""Cost of a run's initial model."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from stackjax.checkpoint.directory import absolute, find_checkpoint
from stackjax.checkpoint.lineage import Generation
from stackjax.checkpoint.restore import read_contents
from stackjax.runtime.errors import UserError


def read_origin(directory: epath.Path, config: Mapping[str, Any]) -> tuple[Generation, ...]:
    """Returns the initial model's lineage, from the run's checkpoints; empty for a new model.

    Args:
      config: Every field, by command-line name.

    Raises:
      UserError: The initial model's cost is unknown.
    """
    start = config.get("init_from")
    if start is None:
        return ()
    stage = absolute(str(directory / "stage_0" / "train"))
    if not stage.exists():
        raise UserError(
            f"{directory}: init_from is {start}, but {stage} is missing, and its checkpoints "
            f"hold the cost of that model; restore the directory, or leave the run out."
        )
    contents = read_contents(find_checkpoint(stage))
    before = contents.lineage[:-1]
    if not before or not before[0].spent.tokens:
        raise UserError(
            f"{directory}: init_from is {start}, a model with unknown training tokens, so its "
            f"cost cannot be charged; leave the run out, or convert that model again with "
            f"`stackjax.convert --source-tokens`."
        )
    return before
