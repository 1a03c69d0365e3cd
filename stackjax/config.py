"""Run config: the return value of a config file, with every field that a command line sets."""

import dataclasses
from typing import Annotated, Literal

import tyro

from stackjax.data.config import (
    DataConfig,
    SeqLen,
    check_sources,
    check_weights,
)
from stackjax.data.config import SourceConfig as SourceConfig
from stackjax.growth.base import Growth
from stackjax.model.config import ModelConfig, RematPolicy, RopeScaling
from stackjax.optimizers import Optimizer, Schedule
from stackjax.runtime.constraints import Checked, OnlyWith
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import (
    Count,
    NonNegative,
    Positive,
    Rate,
    Seed,
    Size,
    Text,
    Tokens,
)
from stackjax.runtime.ranges import Length, Real, Whole
from stackjax.sharding.config import MeshConfig, MomentMemory


def _parse_growth(text: str) -> Growth:
    # Not at the top: the operators import JAX, and `--help` does without.
    from stackjax.growth import parse_growth

    return parse_growth(text)


GrowthField = Annotated[
    Growth,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="GROWTH",
        instance_from_str=lambda text: _parse_growth(text[0]),
        is_instance=lambda value: isinstance(value, Growth),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A growth operator; on a command line a text such as `stack(4)`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Early stopping: the first condition to hold ends the stage."""

    tokens: Tokens | None = None
    """Stop at this many tokens, counted over all stages."""
    flops_6nd: Positive | None = None
    """Stop at this many FLOPs (6ND), counted over all stages."""
    loss: Positive | None = None
    """Stop at this validation loss or less."""
    slope: Annotated[Positive | None, OnlyWith("slope_tokens")] = None
    """Stop when the validation loss falls by less than this many nats per e-fold increase in
    tokens, by least squares over the last `slope_tokens`."""
    slope_tokens: Annotated[Tokens | None, OnlyWith("slope")] = None
    """Window for the slope, in tokens, with at least three evaluations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewarm:
    """Warm-up for new parameters only (SPARKLING, arXiv:2602.02472)."""

    tokens: Tokens
    """Tokens of linear warm-up from zero after growth; 250 steps in the paper."""
    ratio: Positive = 1.3
    """Learning rate of new parameters after the warm-up, relative to old parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchStep:
    """Another batch size from some point of a stage on."""

    from_tokens: Tokens
    """Tokens of the stage before the first step with this batch."""
    batch_size: Size
    """Sequences per optimizer step, over all devices and microbatches."""
    accumulate: Size = 1
    """Microbatches per step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: one model, trained for a number of tokens."""

    tokens: Tokens | None = None
    """Length in tokens, rounded up to whole steps."""
    fraction: Annotated[float, Real(more_than=0, less_than=1)] | None = None
    """Length as a fraction of the run, instead of `tokens`."""
    batch_size: Size
    """Sequences per optimizer step, over all devices and microbatches."""
    accumulate: Size = 1
    """Microbatches per step (gradient accumulation)."""
    batch_steps: Annotated[tuple[BatchStep, ...], Length(at_least=0, at_most=100)] = ()
    """Later batch sizes, as a schedule over the stage's tokens (arXiv:2505.23971)."""
    until: EarlyStop = EarlyStop()
    """Early stopping. Learning rates follow the planned length."""
    seq_len: SeqLen | None = None
    """Tokens in each sequence; by default the data's. It must divide the run's longest."""
    source_weights: Annotated[tuple[NonNegative, ...], Length(at_most=1000)] | None = None
    """Weight of each of the data's sources, in their order; by default their own weights."""
    source_ramp_tokens: Annotated[Tokens | None, OnlyWith("source_weights")] = None
    """Change the shares linearly over this many tokens from the shares of the stage before."""
    rope_theta: Annotated[float, Real(at_least=1)] | None = None
    """Base of the rotary positions in this stage; by default the model's."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary positions in this stage; by default the model's."""
    growth: GrowthField | None = None
    """Growth at the start of the stage; None in the first stage."""
    optimizer_state: Annotated[Literal["reset", "grow", "keep"], OnlyWith("growth")] = "reset"
    """Optimizer state after growth: reset (arXiv:2405.15319), grow the moments with the
    gradients, or keep old moments and zero new moments."""
    average_checkpoints: Annotated[Size, OnlyWith("growth")] = 1
    """Grow from the mean parameters of this many last checkpoints of the stage before
    (arXiv:2306.03241); the optimizer state is from the last checkpoint."""
    rewarm: Annotated[Rewarm | None, OnlyWith("growth")] = None
    """Warm-up for new parameters."""
    scale_by_fan_in: Annotated[bool, OnlyWith("growth")] = False
    """Divide the learning rate of each matrix by the growth factor of its fan-in."""
    train_layers: Text = "all"
    """Trainable layers: `all`, `new` (added by growth), or numbers from 1 such as `(7..12)`.
    With frozen layers the embedding is frozen too; head and final norm are trained."""
    peak_learning_rate: Rate | None = None
    """Peak learning rate; by default the optimizer's."""
    schedule: Schedule | None = None
    """Learning-rate schedule; by default the optimizer's."""
    mesh: MeshConfig | None = None
    """Mesh for this stage; by default the run's mesh."""
    remat: RematPolicy | None = None
    """Rematerialization in this stage; by default the model's."""
    loss_chunk: Annotated[int, Whole(at_least=1, at_most=2**24)] | None = None
    """Positions per chunk of the loss in this stage; by default the model's."""
    moment_memory: MomentMemory = "device"
    """Memory for the optimizer's moments between steps. With `host`, each step copies the
    moments to the devices and back. GPUs then have more memory for activations; TPUs do not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation at intervals, at the end, and before and after each growth."""

    every_tokens: Tokens
    """Tokens between evaluations."""
    num_sequences: Annotated[int, Whole(at_least=1, at_most=2**31 - 1)]
    """Validation sequences, the same in every evaluation."""
    batch_size: Size
    """Sequences per evaluation batch, over all devices."""
    layers: bool = False
    """Log layer statistics too: similarity to other copies of the source layer, contribution
    to the residual stream, weight norm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Growth probes: growth of a copy of the model, before the stage ends."""

    at_tokens: tuple[Tokens, ...] = ()
    """Token counts of the run at which a copy grows as in the next stage, and then trains."""
    lag_tokens: Annotated[Tokens | None, OnlyWith("at_tokens")] = None
    """Training tokens of the copy before its validation loss is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Evaluation on lm-evaluation-harness tasks while training."""

    names: tuple[Text, ...] = ()
    """Task or group names; lm-evaluation-harness is only needed if there are any."""
    every_tokens: Annotated[Tokens | None, OnlyWith("names")] = None
    """Tokens between evaluations on tasks. The last one is at the end of the run."""
    directory: Annotated[Text | None, OnlyWith("names")] = None
    """Directory with additional tasks (YAML files)."""
    num_fewshot: Annotated[Count | None, OnlyWith("names")] = None
    """Solved examples before each question; by default as each task says."""
    limit: Annotated[Tokens | None, OnlyWith("names")] = None
    """Use only this many documents per task; by default all."""
    batch_size: Annotated[Size, OnlyWith("names")] = 32
    """Texts per batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """Loss spikes: steps with a loss or gradient norm far above the steps before."""

    action: Literal["ignore", "skip", "stop"] = "ignore"
    """`skip`: leave parameters and optimizer state unchanged in such a step. `stop`: end the
    run before the step."""
    deviations: Annotated[Positive, OnlyWith(action=("skip", "stop"))] = 6.0
    """A spike is above the running mean by more than this many standard deviations."""
    window_steps: Annotated[Size, OnlyWith(action=("skip", "stop"))] = 128
    """Steps in the running mean and deviation. They start anew in each stage, and no step is a
    spike before the window is full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and retention of checkpoints."""

    every_tokens: Tokens
    """Tokens between checkpoints. The end of each stage is always saved."""
    keep_last: Size = 2
    """Recent checkpoints to keep per stage; the last checkpoint of a stage is always kept. A
    checkpoint saved at a signal to stop does not replace another."""
    keep_every_tokens: Tokens | None = None
    """Keep the first checkpoint past every multiple of this many tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics, besides `metrics.jsonl` in the run directory."""

    every_tokens: Tokens
    """Tokens between rows of metrics."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: Text | None = None
    """Weights & Biases project; needs `pip install wandb`."""
    profile_from: Size | None = None
    """First step of a profiler trace (XProf) in `profile/` of the run directory, counted from
    1 over all stages."""
    profile_steps: Size = 5
    """Steps in a profiler trace, also in a trace requested by SIGUSR1."""
    stall_seconds: Positive | None = None
    """Print all stacks to stderr if the next step does not start for this many seconds, also in
    a long evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """A run: a model that may grow between stages."""

    model: ModelConfig
    """The first or the last model, as `model_is` says; growth determines all other models."""
    model_is: Literal["source", "target"] = "target"
    """`target`: `model` belongs to the last stage. `source`: `model` belongs to the first."""
    data: DataConfig
    """Training and validation data."""
    optimizer: Optimizer
    """Optimizer and learning rate."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh."""
    stages: Annotated[tuple[Stage, ...], Length(at_most=256)]
    """Stages, in order."""
    init_from: Text | None = None
    """Initial parameters: a run, a checkpoint, or a Hugging Face folder. Optimizer state, data
    position and token counts start from zero."""
    evaluation: EvaluationConfig
    """Validation."""
    probes: ProbeConfig = ProbeConfig()
    """Growth probes."""
    tasks: TasksConfig = TasksConfig()
    """Evaluation on tasks."""
    spikes: SpikeConfig = SpikeConfig()
    """Loss spikes."""
    checkpoints: CheckpointConfig
    """Checkpoints."""
    logging: LoggingConfig
    """Metrics."""
    platform: Literal["any", "accelerator"] = "any"
    """`accelerator` refuses to start on a CPU."""
    seed: Seed = 0
    """Seed for initial parameters and data order."""
    workdir: Text
    """Run directory. The same command again resumes the run."""

    def __post_init__(self):
        super().__post_init__()
        check_sources(self.data)
        num_sources = len(self.data.all_sources)
        for index, stage in enumerate(self.stages):
            if stage.source_weights is not None:
                field = f"stages.{index}.source_weights"
                check_weights(stage.source_weights, num_sources, field)
            if stage.average_checkpoints > self.checkpoints.keep_last:
                raise UserError(
                    f"stages.{index}.average_checkpoints is {stage.average_checkpoints}, more "
                    f"than checkpoints.keep_last {self.checkpoints.keep_last}; average fewer, "
                    f"or keep more."
                )
        keep, every = self.checkpoints.keep_every_tokens, self.checkpoints.every_tokens
        if keep is not None and keep % every:
            raise UserError(
                f"checkpoints.keep_every_tokens is {keep}; it must be a multiple of "
                f"checkpoints.every_tokens {every}."
            )
