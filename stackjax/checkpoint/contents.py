"""Checkpoint descriptions."""

import dataclasses
from typing import Any

from etils import epath

from stackjax.checkpoint.lineage import Generation
from stackjax.config_record import RECORD, read_config_record
from stackjax.files.json_file import Fields, decode, seal, unseal
from stackjax.files.rows_file import Extent
from stackjax.model.config import ModelConfig
from stackjax.optimizers import Optimizer, find_optimizer
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Counts
from stackjax.training.spikes import SpikeStatistics


@dataclasses.dataclass(frozen=True)
class OptimizerForm:
    """Optimizer fields with influence on the optimizer state's form."""

    name: str
    moments_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Contents:
    """A checkpoint's description of the state."""

    counts: Counts
    """Consumed tokens, sequences and FLOPs."""
    model: ModelConfig
    is_model: bool
    """Are the parameters a model? Not during a fit, and not before all masks are open."""
    lineage: tuple[Generation, ...]
    """All generations, the newest last."""
    rows: Extent = dataclasses.field(default_factory=Extent)
    """The run's metric rows up to this state."""
    optimizer: OptimizerForm | None = None
    """None without optimizer state, and in older checkpoints."""
    spikes: SpikeStatistics | None = None
    """Running statistics for loss spikes; None if spikes are ignored."""


def form_of(optimizer: Optimizer) -> OptimizerForm:
    """Returns the form for an optimizer."""
    return OptimizerForm(optimizer.name, getattr(optimizer, "moments_dtype", "float32"))


def saved_optimizer(
    checkpoint: epath.Path, contents: Contents, saved: dict[str, str]
) -> Optimizer:
    """Returns an optimizer for a checkpoint's optimizer state, with defaults in other fields.

    Older checkpoints do not name an optimizer; the run's config does.

    Args:
      saved: The checkpoint's `array_types`.

    Raises:
      UserError: No optimizer state, or an unknown optimizer.
    """
    form = contents.optimizer or _form_in_config(checkpoint)
    if form is None or not any(path.startswith("opt_state") for path in saved):
        raise UserError(
            f"{checkpoint} holds no optimizer state of a known optimizer; leave "
            f"--optimizer-state at reset."
        )
    kind = find_optimizer(form.name)
    fields = {field.name for field in dataclasses.fields(kind)}
    values: Any = {"moments_dtype": form.moments_dtype} if "moments_dtype" in fields else {}
    return kind(peak_learning_rate=1.0, **values)


def _form_in_config(checkpoint: epath.Path) -> OptimizerForm | None:
    """Returns the form from the run's config; None without a config."""
    for directory in list(checkpoint.parents)[:3]:
        if (directory / RECORD).exists():
            config = read_config_record(directory / RECORD)["config"]
            dtype = config.get("optimizer.moments_dtype", "float32")
            return OptimizerForm(config["optimizer.name"], dtype)
    return None


def to_json(contents: Contents) -> Fields:
    """Returns contents as plain values with their hash."""
    return seal(dataclasses.asdict(contents))


def from_json(fields: Any) -> Contents:
    """Returns contents from the plain values of `to_json`; UserError if they are damaged."""
    contents = decode(Contents, unseal(fields), "contents")
    if not contents.lineage:
        raise UserError("contents.lineage is empty")
    return contents
