"""The phases that a run consists of: the stages of its config, with every number settled."""

import dataclasses
import math

from stackjax.config import Config, Growth, Stage
from stackjax.flops import flops_6nd, matmul_flops
from stackjax.model.config import ModelConfig
from stackjax.optimizer import LearningRate
from stackjax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a run has consumed, over all its stages; whole numbers of any size."""

    tokens: int = 0
    examples: int = 0
    """Sequences; the index of the next one in the order of the data."""
    flops_6nd: int = 0
    """FLOPs by 6 x parameters x tokens, as arXiv:2405.15319 counts."""
    flops: int = 0
    """FLOPs of the matrix products."""

    def after(self, per_step: "Counts", steps: int = 1) -> "Counts":
        """Returns the counts after `steps` steps of `per_step` each."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(per_step)
        return Counts(*(a + steps * b for a, b in zip(mine, theirs, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a stage with one tree of trainable parameters and one compiled step."""

    index: int
    """Position among the phases of the run."""
    stage: int
    """Index of the stage that it belongs to."""
    name: str
    """What the phase does in its stage: `train`."""
    model: ModelConfig
    growth: Growth | None
    """How the model grows out of the phase before."""
    grow_optimizer: bool
    """Whether the optimizer state grows too, or starts afresh."""
    mesh: MeshConfig
    batch_size: int
    accumulate: int
    num_steps: int
    learning_rate: LearningRate
    start: Counts
    """What the run has consumed before the phase."""
    per_step: Counts
    """What each step consumes."""

    @property
    def directory(self) -> str:
        """Where its checkpoints lie in the run directory."""
        return f"stage_{self.stage}/{self.name}"

    @property
    def end(self) -> Counts:
        """What the run has consumed after the phase."""
        return self.start.after(self.per_step, self.num_steps)


def expand(config: Config) -> tuple[Phase, ...]:
    """Returns the phases of a run; ValueError where stages do not fit together."""
    if config.stages[0].growth is not None:
        raise ValueError(
            "stages.0.growth is set, but there is no model before the first stage; put "
            "the growth into a later stage."
        )
    models = stage_models(config)
    lengths = stage_steps(config)
    run_tokens = sum(
        steps * stage.batch_size * config.data.seq_len
        for stage, steps in zip(config.stages, lengths, strict=True)
    )
    phases: list[Phase] = []
    start = Counts()
    for i, (stage, model, steps) in enumerate(zip(config.stages, models, lengths, strict=True)):
        tokens = stage.batch_size * config.data.seq_len
        per_step = Counts(
            tokens=tokens,
            examples=stage.batch_size,
            flops_6nd=tokens * flops_6nd(model),
            flops=tokens * matmul_flops(model, config.data.seq_len),
        )
        phases.append(
            Phase(
                index=len(phases),
                stage=i,
                name="train",
                model=model,
                growth=stage.growth,
                grow_optimizer=stage.growth is None or stage.optimizer_state == "grow",
                mesh=stage.mesh or config.mesh,
                batch_size=stage.batch_size,
                accumulate=stage.accumulate,
                num_steps=steps,
                learning_rate=_learning_rate(config, i, tokens, steps, start, run_tokens),
                start=start,
                per_step=per_step,
            )
        )
        start = phases[-1].end
    return tuple(phases)


def scratch_tokens(config: Config) -> int:
    """Returns the tokens that train the last model from scratch for the FLOPs of the run.

    FLOPs by 6ND; all stages are charged, so this is where the two break even.
    """
    phases = expand(config)
    return math.ceil(phases[-1].end.flops_6nd / flops_6nd(phases[-1].model))


def stage_models(config: Config) -> list[ModelConfig]:
    """Returns the model of each stage, from the one that the config names."""
    growths = [stage.growth for stage in config.stages[1:]]
    models = [config.model]
    if config.model_is == "source":
        for growth in growths:
            models.append(growth.target_config(models[-1]) if growth else models[-1])
        return models
    for growth in reversed(growths):
        models.insert(0, growth.source_config(models[0]) if growth else models[0])
    return models


def stage_steps(config: Config) -> list[int]:
    """Returns the optimizer steps of each stage: its length, rounded up."""
    for i, stage in enumerate(config.stages):
        if (stage.tokens is None) == (stage.fraction is None):
            raise ValueError(
                f"stages.{i} has tokens {stage.tokens} and fraction {stage.fraction}; set "
                f"one of the two."
            )
    fraction = sum(stage.fraction or 0 for stage in config.stages)
    if not 0 <= fraction < 1:
        raise ValueError(
            f"the stages' fractions add up to {fraction}; they must leave room for a "
            f"stage whose length is in tokens, which settles that of the run."
        )
    run_tokens = sum(stage.tokens or 0 for stage in config.stages) / (1 - fraction)
    return [_steps(config, i, stage, run_tokens) for i, stage in enumerate(config.stages)]


def _steps(config: Config, index: int, stage: Stage, run_tokens: float) -> int:
    tokens = run_tokens * stage.fraction if stage.fraction is not None else stage.tokens
    assert tokens is not None, "stage_steps checks that one of the two is set"
    steps = math.ceil(tokens / (stage.batch_size * config.data.seq_len))
    if steps < 1:
        raise ValueError(f"stages.{index} is {tokens} tokens long; it needs more than 0.")
    return steps


def _learning_rate(
    config: Config,
    index: int,
    tokens_per_step: int,
    steps: int,
    start: Counts,
    run_tokens: int,
) -> LearningRate:
    stage = config.stages[index]
    schedule = stage.schedule or config.optimizer.schedule
    of_run = schedule.axis == "run"
    horizon = schedule.horizon_tokens
    if horizon is None:
        horizon = run_tokens if of_run else steps * tokens_per_step
    if schedule.shape == "wsd" and schedule.decay_tokens is None:
        raise ValueError(
            f"the schedule of stages.{index} is wsd without decay_tokens; say how many "
            f"tokens its decay takes."
        )
    if schedule.warmup_tokens + (schedule.decay_tokens or 0) > horizon:
        raise ValueError(
            f"the schedule of stages.{index} warms up over {schedule.warmup_tokens} and "
            f"decays over {schedule.decay_tokens or 0} tokens, which is more than its "
            f"horizon of {horizon}."
        )
    peak = stage.peak_learning_rate
    return LearningRate(
        peak=config.optimizer.peak_learning_rate if peak is None else peak,
        schedule=schedule,
        horizon_tokens=horizon,
        first_tokens=start.tokens if of_run else 0,
        tokens_per_step=tokens_per_step,
    )
