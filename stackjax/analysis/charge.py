"""The cost of an earlier model, with which the curves of a run begin."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from stackjax.checkpoint.directory import absolute, find_checkpoint
from stackjax.checkpoint.lineage import Generation
from stackjax.checkpoint.restore import read_contents
from stackjax.runtime.errors import UserError


def read_origin(directory: epath.Path, config: Mapping[str, Any]) -> tuple[Generation, ...]:
    """Returns the generations before a run, from its checkpoints; none for a new model.

    Args:
      config: Every field, by name on the command line.

    Raises:
      UserError: Their cost is not known.
    """
    start = config.get("init_from")
    if start is None:
        return ()
    stage = absolute(str(directory / "stage_0" / "train"))
    if not stage.exists():
        raise UserError(
            f"{directory} started from {start}, and the checkpoints in {stage}, which tell "
            f"its cost, are gone; bring one back, or leave the run out."
        )
    contents = read_contents(find_checkpoint(stage))
    before = contents.lineage[:-1]
    if not before or not before[0].spent.tokens:
        raise UserError(
            f"{directory} started from {start}, which does not say how many tokens its model "
            f"was trained on, so that its cost cannot be charged; leave the run out, or train "
            f"from a checkpoint that `stackjax.convert --source-tokens` has made."
        )
    return before
