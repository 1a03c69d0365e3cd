"""A phase in the config: stage, models, batches and planned ends."""

import dataclasses

from stackjax.config import Config, Stage
from stackjax.data.mixture import Mixture
from stackjax.growth import Growth
from stackjax.growth.base import Fit
from stackjax.model.config import ModelConfig
from stackjax.model.flops import flops_6nd, matmul_flops
from stackjax.model.transformer import logical_axes
from stackjax.training.phase import Counts
from stackjax.training.stages import Part, planned_tokens, trained_layers


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """A phase in the config."""

    config: Config
    index: int
    """Stage index."""
    fit: Fit | None
    before: ModelConfig
    """Model in the previous stage; for the first stage, the same model."""
    model: ModelConfig
    seq_len: int
    mixture: Mixture
    part: int
    """Position among the parts of the stage with different batches."""
    batches: tuple[Part, ...]
    """This part and the later parts of the stage."""
    stage_start: int
    """The run's tokens before the stage."""
    train_start: int
    """The run's tokens before the fit, or before the first part with training."""

    @property
    def batch(self) -> Part:
        """The batch of this part; a fit has the stage's first batch."""
        return self.batches[0]

    @property
    def end_tokens(self) -> float:
        """The run's tokens at the end of the part, before rounding to whole steps."""
        return self.stage_start + self.batch.end_tokens

    @property
    def stage(self) -> Stage:
        return self.config.stages[self.index]

    @property
    def growth(self) -> Growth | None:
        """Growth at the start of the phase; a learned growth belongs to the fit."""
        return None if self.part else self.stage_growth

    @property
    def stage_growth(self) -> Growth | None:
        """Growth at the start of the stage; None after a fit."""
        return None if self.is_fitted and self.fit is None else self.stage.growth

    @property
    def is_fitted(self) -> bool:
        """Does the stage begin with a fit?"""
        return self.stage.growth is not None and self.stage.growth.is_fitted

    @property
    def source(self) -> ModelConfig:
        return self.before if self.growth is not None else self.model

    @property
    def trained_layers(self) -> tuple[bool, ...] | None:
        return trained_layers(self.index, self.stage, self.before, self.model)

    @property
    def per_step(self) -> Counts:
        """Counts per step."""
        batch, seq_len, trained = self.batch, self.seq_len, self.trained_layers
        tokens, making = batch.batch_size * seq_len, 0
        if self.fit is not None:
            # Every microbatch computes the target's parameters again.
            making = batch.accumulate * self.fit.flops(logical_axes(self.before))
        return Counts(
            tokens=tokens,
            examples=batch.batch_size,
            flops_6nd=tokens * flops_6nd(self.model, trained) + making,
            flops=tokens * matmul_flops(self.model, seq_len, trained) + making,
        )

    def stage_end(self, tokens: int) -> int:
        """Returns the run's tokens after the stage, in whole steps.

        Args:
          tokens: The run's tokens after this part.
        """
        return planned_tokens(self.batches[1:], self.seq_len, tokens, self.stage_start)
