"""Base class for optimizers, and learning-rate schedules."""

import abc
import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from stackjax.runtime.constraints import OnlyWith, check_fields
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Count, Rate, Share, Tokens

if TYPE_CHECKING:
    import optax

    from stackjax.model.parametrization import Ratios
    from stackjax.sharding.axes import Axes

DECAYING = ("cosine", "wsd")
"""Shapes with a decay."""

OPTIMIZERS: dict[str, type["Optimizer"]] = {}
"""All subclasses of `Optimizer` by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning-rate schedule over tokens, as fractions of the peak."""

    shape: Literal["cosine", "constant", "wsd"] = "cosine"
    """Half a cosine; no decay; or linear decay in the last `decay_tokens`."""
    warmup_tokens: Count = 0
    """Tokens of linear warm-up."""
    horizon_tokens: Annotated[Tokens | None, OnlyWith(shape=DECAYING)] = None
    """Tokens until the end of the decay, warm-up included; by default the length of the stage
    (or run, by `axis`). May exceed this length."""
    decay_tokens: Annotated[Tokens | None, OnlyWith(shape="wsd")] = None
    """Tokens of linear decay before the horizon (WSD only)."""
    final_fraction: Annotated[Share, OnlyWith(shape=DECAYING)] = 0.1
    """Rate at and after the horizon, as a fraction of the peak."""
    axis: Annotated[Literal["stage", "run"], OnlyWith("warmup_tokens", shape=DECAYING)] = (
        "stage"
    )
    """Count tokens from the start of the stage or the run. With `run`, a stage continues the
    previous schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """An optimizer with a learning-rate schedule.

    A subclass adds fields and `build`, for example in a config file:

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Lion(Optimizer):
            b1: float = 0.9

            def build(self, axes):
                return optax.scale_by_lion(b1=self.b1)
    """

    peak_learning_rate: Rate
    """Peak learning rate in stages without their own peak."""
    schedule: Schedule = Schedule()
    """Schedule in stages without their own schedule."""
    z_loss: Share = 0.0
    """Weight of the squared log-normalizer in the loss (0 is off; PaLM uses 1e-4)."""

    def __init_subclass__(cls):
        OPTIMIZERS[cls.__name__.lower()] = cls

    def __post_init__(self):
        check_fields(self, "optimizer")

    @property
    def name(self) -> str:
        """Name in records and on the command line, such as `adamw`."""
        return type(self).__name__.lower()

    @abc.abstractmethod
    def build(self, axes: Any) -> "optax.GradientTransformation":
        """Returns an optax transformation without learning rate, like `optax.scale_by_adam`.

        A train step subtracts the learning rate times the update from each parameter. For
        growth of the optimizer state, `stackjax.growth.moments` must know all arrays in the
        state. `update` may take an extra argument `moment_starts`, to correct the bias of
        moments younger than the optimizer.

        Args:
          axes: The `Axes` of each parameter.
        """

    def build_scaled(self, axes: Any, ratios: Any) -> "optax.GradientTransformation":
        """Returns `build` with CompleteP's factors for weight decay and epsilon.

        The optimizer state has the form of `build`.

        Args:
          axes: The `Axes` of each parameter.
          ratios: The `Ratios` of each parameter.

        Raises:
          UserError: The optimizer has no rule for CompleteP.
        """
        raise self._no_rule()

    def rate_factor(self, axes: "Axes", ratios: "Ratios") -> float:
        """Returns a parameter's learning-rate factor under CompleteP.

        Raises:
          UserError: The optimizer has no rule for CompleteP.
        """
        raise self._no_rule()

    def _no_rule(self) -> UserError:
        return UserError(
            f"optimizer {self.name} has no rule for model.completep; define rate_factor and "
            f"build_scaled in {type(self).__name__}, or take adamw or muon."
        )

    def build_fit(self) -> "optax.GradientTransformation":
        """Returns the transformation for fits of learned growth: clipped Adam."""
        import optax  # not at the top: `--help` does without

        return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95))


def find_optimizer(name: str) -> type[Optimizer]:
    """Returns the optimizer class with a name; UserError for an unknown name."""
    if name not in OPTIMIZERS:
        raise UserError(
            f"optimizer is {name!r}; it must be {', '.join(map(repr, OPTIMIZERS))}, or a "
            f"subclass of Optimizer in the file of --config."
        )
    return OPTIMIZERS[name]
