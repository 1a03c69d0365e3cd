"""The phases that a run consists of: the stages of its config, with every number settled."""

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from stackjax.axes import Axes
from stackjax.config import Config, Schedule, Stage
from stackjax.flops import flops_6nd, matmul_flops
from stackjax.growth import Growth, Learn
from stackjax.growth.base import Chain, Reparameterisation
from stackjax.growth.learned import Fit
from stackjax.growth.masked import Mask
from stackjax.growth.pattern import parse_pattern
from stackjax.model.config import ModelConfig
from stackjax.model.transformer import LayerSpan, logical_axes
from stackjax.optimizer import LearningRate, ParameterRates
from stackjax.sharding import MeshConfig, laid_out, partition


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
    name: Literal["fit", "train"]
    """What the phase does in its stage: fit the maps of a learned growth, or train."""
    source: ModelConfig
    """The model of the phase before, or the phase's own if it is the first."""
    model: ModelConfig
    growth: Growth | None
    """How the model grows out of the phase before."""
    optimizer_state: Literal["reset", "grow", "keep"]
    """Whether the optimizer starts afresh, grows its moments, or keeps old ones."""
    reparameterisations: tuple[Reparameterisation, ...]
    """What lies between the parameters that train and those that the model runs."""
    trained_layers: tuple[bool, ...] | None
    """Which layers learn; None if everything does."""
    mesh: MeshConfig
    batch_size: int
    accumulate: int
    num_steps: int
    learning_rate: LearningRate
    parameter_rates: ParameterRates | None
    """Factors of the learning rate of each parameter; None if all are 1."""
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

    @property
    def stays_symmetric(self) -> bool:
        """Whether copies in the model are equal and have equal gradients for ever."""
        if self.growth is None or self.optimizer_state == "keep":
            return False
        rates = self.parameter_rates
        alike = rates is None or rates.rewarm is None
        return alike and self.growth.is_symmetric()

    @property
    def spans(self) -> list[LayerSpan] | None:
        """How the layers run where only some learn: one scan for each run of them."""
        if self.trained_layers is None:
            return None
        return [
            LayerSpan(
                num_layers=len(list(run)),
                remat=self.model.remat,
                unroll=self.model.scan_unroll,
                trains=trains,
            )
            for trains, run in itertools.groupby(self.trained_layers)
        ]

    def trains_model(self, step: int) -> bool:
        """Returns whether what trains is, after a step, what the model runs.

        It is once every mask is open, and never while the maps of a growth are fitted.
        """
        tokens = step * self.per_step.tokens
        return all(
            isinstance(mask, Mask) and tokens >= mask.first_tokens + mask.tokens
            for mask in self.reparameterisations
        )

    def model_params(self, params: Any, step: jax.Array | int) -> Any:
        """Returns the parameters that the model runs, of those that train."""
        if not self.reparameterisations:
            return params
        axes = logical_axes(self.model)
        tokens = jnp.asarray(step, jnp.float32) * float(self.per_step.tokens)

        def apply(params: Any, tokens: jax.Array) -> Any:
            for reparameterisation in self.reparameterisations:
                params = reparameterisation.model_params(params, axes, tokens)
            return params

        layout = jax.tree.map(partition, axes, is_leaf=lambda node: isinstance(node, Axes))
        return laid_out(apply, layout)(params, tokens)

    def step_params(self, params: Any, updates: Any, step: jax.Array) -> Any:
        """Returns parameters after a step along the optimizer's updates."""
        rate = self.learning_rate(step)
        if self.parameter_rates is None:
            return jax.tree.map(lambda p, update: p - rate * update, params, updates)
        tokens = (jnp.asarray(step, jnp.float32) + 1) * float(self.per_step.tokens)
        factors = self.parameter_rates(logical_axes(self.model), tokens)
        return jax.tree.map(
            lambda p, update, factor: p - rate * factor * update, params, updates, factors
        )


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
    for i, steps in enumerate(lengths):
        for phase in _stage_phases(config, i, models, steps, start, run_tokens):
            phases.append(dataclasses.replace(phase, index=len(phases)))
            start = phase.end
    return tuple(phases)


def _stage_phases(
    config: Config,
    index: int,
    models: list[ModelConfig],
    steps: int,
    start: Counts,
    run_tokens: int,
) -> list[Phase]:
    """Returns the phases of one stage, in order; their indices are not settled yet."""
    stage, model = config.stages[index], models[index]
    source, growth = models[max(index - 1, 0)], stage.growth
    step_tokens = stage.batch_size * config.data.seq_len
    trained = _trained_layers(index, stage, source, model)
    train = Phase(
        index=0,
        stage=index,
        name="train",
        source=source,
        model=model,
        growth=growth,
        # What does not grow goes on as it is.
        optimizer_state=stage.optimizer_state if growth is not None else "keep",
        reparameterisations=growth.reparameterisations(source) if growth else (),
        trained_layers=trained,
        mesh=stage.mesh or config.mesh,
        batch_size=stage.batch_size,
        accumulate=stage.accumulate,
        num_steps=steps,
        learning_rate=_learning_rate(config, index, step_tokens, steps, start, run_tokens),
        parameter_rates=_parameter_rates(index, stage, source, trained),
        start=start,
        per_step=Counts(
            tokens=step_tokens,
            examples=stage.batch_size,
            flops_6nd=step_tokens * flops_6nd(model, trained),
            flops=step_tokens * matmul_flops(model, config.data.seq_len, trained),
        ),
    )
    if not isinstance(growth, Learn):
        _check_growth(train)
        return [train]
    fit = _fit_phase(train, growth)
    rest = steps - fit.num_steps
    train = dataclasses.replace(
        train,
        source=model,
        growth=None,
        optimizer_state="reset",
        num_steps=rest,
        learning_rate=_learning_rate(config, index, step_tokens, rest, fit.end, run_tokens),
        start=fit.end,
    )
    return [fit, train]


def _fit_phase(train: Phase, growth: Learn) -> Phase:
    """Returns the phase that fits a learned growth, before the one that trains."""
    if train.optimizer_state != "reset":
        raise ValueError(
            f"stages.{train.stage}.optimizer_state is {train.optimizer_state!r}; after a "
            f"learned growth the optimizer can only be 'reset'."
        )
    if train.parameter_rates is not None:
        raise ValueError(
            f"stages.{train.stage} has rewarm, scale_by_fan_in or train_layers, which a "
            f"learned growth does not take: all of its parameters are new."
        )
    if growth.fit_steps >= train.num_steps:
        raise ValueError(
            f"stages.{train.stage} has {train.num_steps} steps, of which its growth takes "
            f"{growth.fit_steps} for the fit; give it more tokens, or fewer fit_steps."
        )
    # Every microbatch makes the target's parameters for itself.
    making = train.accumulate * growth.flops(logical_axes(train.source), train.source)
    per_step = train.per_step
    return dataclasses.replace(
        train,
        name="fit",
        reparameterisations=(Fit(growth, train.source),),
        num_steps=growth.fit_steps,
        learning_rate=LearningRate(
            peak=growth.learning_rate,
            schedule=Schedule(shape="constant"),
            horizon_tokens=growth.fit_steps * per_step.tokens,
            first_tokens=0,
            tokens_per_step=per_step.tokens,
        ),
        per_step=dataclasses.replace(
            per_step,
            flops_6nd=per_step.flops_6nd + making,
            flops=per_step.flops + making,
        ),
    )


def _check_growth(phase: Phase) -> None:
    """Raises ValueError where a growth does not fit into its stage."""
    if isinstance(phase.growth, Chain):
        for link in phase.growth.growths:
            if isinstance(link, Learn):
                raise ValueError(
                    f"stages.{phase.stage}.growth is {phase.growth}; a learned growth stands "
                    f"alone, and grows depth and width by itself."
                )
    tokens = phase.num_steps * phase.per_step.tokens
    for mask in phase.reparameterisations:
        if isinstance(mask, Mask) and mask.first_tokens + mask.tokens > tokens:
            raise ValueError(
                f"stages.{phase.stage} is {tokens} tokens long, and the last mask of "
                f"{phase.growth} is open after {mask.first_tokens + mask.tokens}; lower "
                f"mask_tokens, or make the stage longer."
            )


def _trained_layers(
    index: int, stage: Stage, source: ModelConfig, model: ModelConfig
) -> tuple[bool, ...] | None:
    if stage.train_layers == "all":
        return None
    field = f"stages.{index}.train_layers"
    if stage.train_layers == "new":
        maps = stage.growth.axis_maps(source) if stage.growth else {}
        if "layers" not in maps or not maps["layers"].is_new.any():
            raise ValueError(
                f"{field} is 'new', but the stage has no growth that adds layers; name them "
                f"by number, or train 'all'."
            )
        return tuple(bool(new) for new in maps["layers"].is_new)
    try:
        layers = parse_pattern(stage.train_layers)
    except ValueError as error:
        raise ValueError(f"{field}: {error} It may also be 'all' or 'new'.") from None
    if max(layers) >= model.num_layers:
        raise ValueError(
            f"{field} is {stage.train_layers!r}, which names layer {max(layers) + 1} of a "
            f"model with {model.num_layers}."
        )
    return tuple(layer in layers for layer in range(model.num_layers))


def _parameter_rates(
    index: int, stage: Stage, source: ModelConfig, trained: tuple[bool, ...] | None
) -> ParameterRates | None:
    grows = stage.rewarm is not None or stage.scale_by_fan_in
    if grows and stage.growth is None:
        raise ValueError(
            f"stages.{index} has rewarm or scale_by_fan_in, which are about growth, but no "
            f"growth."
        )
    if not grows and trained is None:
        return None
    return ParameterRates(
        source=source,
        growth=stage.growth,
        rewarm=stage.rewarm,
        scale_by_fan_in=stage.scale_by_fan_in,
        trained_layers=trained,
    )


def scratch_tokens(config: Config) -> int:
    """Returns the tokens that train the last model from scratch for the FLOPs of the run.

    FLOPs by 6ND; all stages are charged, so this is where the two break even.
    """
    phases = expand(config)
    return math.ceil(phases[-1].end.flops_6nd / flops_6nd(phases[-1].model))


def last_stage_tokens(config: Config, flops: float) -> int:
    """Returns the length of the last stage with which a run costs that many FLOPs (6ND).

    In tokens, rounded down to whole steps; at least one step.
    """
    phases = expand(config)
    last, first = phases[-1], next(p for p in phases if p.stage == phases[-1].stage)
    steps = max(1, int((flops - last.start.flops_6nd) // last.per_step.flops_6nd))
    return last.start.tokens - first.start.tokens + steps * last.per_step.tokens


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
