"""Logical axis names of a parameter, read by sharding, growth and optimizers alike."""

import dataclasses

LAYER_AXES = ("layers", "expert_layers", "dense_layers")
"""Stacked axes over layers: all, those with experts, those without."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axis names of an array, in order: stacked, input, fused and output axes.

    `Axes(("layers",), ("embed",), ("heads", "head_dim"))` describes an array of shape
    [layers, embed, heads, head_dim]. Each layer has a linear map from `embed` to `heads` and
    `head_dim`.
    """

    stacked: tuple[str, ...] = ()
    """Axes along which independent linear maps are stacked."""
    reads: tuple[str, ...] = ()
    """Input axes; the linear map sums over these axes."""
    writes: tuple[str, ...] = ()
    """Output axes."""
    fused: tuple[str, ...] = ()
    """Axes over different maps with the same inputs, such as gate and value of a SwiGLU."""

    bias: bool = False
    """Whether the values are added to an output, which has these output axes."""
    unit_offset: bool = False
    """Whether 1 is added to the values when they are used, as to the gains in Gemma."""
    joins: bool | None = None
    """Whether the output joins the residual stream; None for a matrix that writes `embed`.
    With a norm on a branch, the norm's gain joins the stream, and the matrix does not. The bias
    of a branch's output has True or False, the bias of a norm at its input has None."""

    @property
    def joins_stream(self) -> bool:
        """Whether the output joins the residual stream."""
        if self.joins is not None:
            return self.joins
        return bool(self.reads) and self.writes == ("embed",)

    @property
    def layer_axis(self) -> str | None:
        """The stacked axis over layers; None outside of layers."""
        return next((name for name in self.stacked if name in LAYER_AXES), None)

    @property
    def names(self) -> tuple[str, ...]:
        """All axis names, in the array's order."""
        return self.stacked + self.reads + self.fused + self.writes

    def stack(self, name: str) -> "Axes":
        """Returns the axes after stacking arrays along a new leading axis."""
        return dataclasses.replace(self, stacked=(name, *self.stacked))
