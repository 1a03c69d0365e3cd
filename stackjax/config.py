"""The schema of a run: what a config file returns, what the command line overrides."""

import dataclasses
from typing import Annotated, Literal

import tyro

from stackjax.data.config import DataConfig
from stackjax.growth.base import Growth
from stackjax.model.config import ModelConfig
from stackjax.runtime.constraints import Checked, OnlyWith
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import (
    Count,
    Decay,
    Epsilon,
    Positive,
    Rate,
    Seed,
    Share,
    Size,
    Text,
    Tokens,
)
from stackjax.runtime.ranges import Length, Real, Whole
from stackjax.sharding.config import MeshConfig


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
"""A growth operator, which a command line writes as `stack(4)`."""

DECAYING = ("cosine", "wsd")
"""The shapes of a schedule that decay."""

MAX_BFLOAT16_DECAY = 0.98
"""The slowest decay of moments that are stored in bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The course of the learning rate, as a fraction of its peak, over tokens."""

    shape: Literal["cosine", "constant", "wsd"] = "cosine"
    """Decay by half a cosine; none; or none until the last `decay_tokens`, then linear."""
    warmup_tokens: Count = 0
    """Tokens over which the rate rises linearly from zero to its peak."""
    horizon_tokens: Annotated[Tokens | None, OnlyWith(shape=DECAYING)] = None
    """Tokens after which the decay has ended, counted from the start of the axis, warm-up
    included; by default the length of the stage (or of the run). May lie past the end."""
    decay_tokens: Annotated[Tokens | None, OnlyWith(shape="wsd")] = None
    """Tokens of linear decay at the end of the horizon (WSD only)."""
    final_fraction: Annotated[Share, OnlyWith(shape=DECAYING)] = 0.1
    """Rate at the horizon and after it, as a fraction of the peak."""
    axis: Annotated[Literal["stage", "run"], OnlyWith("warmup_tokens", shape=DECAYING)] = (
        "stage"
    )
    """Whether tokens are counted from the start of the stage, or of the run (which lets a
    stage continue where the one before it stopped)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon with decoupled weight decay, after clipping by the global norm."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW (arXiv:1711.05101), or Muon (arXiv:2502.16982) for the matrices of layers, with
    updates as large as those of AdamW, and AdamW for the rest."""
    peak_learning_rate: Rate
    """Peak of the schedule of every stage that names none of its own."""
    schedule: Schedule = Schedule()
    """Schedule of every stage that names none of its own."""
    b1: Decay = 0.9
    """Decay of the first moment."""
    b2: Decay = 0.95
    """Decay of the second moment."""
    epsilon: Epsilon = 1e-8
    """Added to the root of the second moment."""
    momentum: Annotated[Decay, OnlyWith(name="muon")] = 0.95
    """Decay of Muon's momentum."""
    weight_decay: Annotated[float, Real(at_least=0, at_most=100)] = 0.1
    """Decoupled weight decay, times the learning rate; norms have none."""
    clip_norm: Positive = 1.0
    """Largest global norm of a gradient."""
    z_loss: Share = 0.0
    """Weight of the squared log-normaliser of the logits (0 is off; PaLM uses 1e-4)."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that moments and momentum are stored in; `bfloat16` saves half of the optimizer
    state and rounds them to 8 bits at every step, so no decay may be more than 0.98."""


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
    """A warm-up of new parameters alone (SPARKLING, arXiv:2602.02472)."""

    tokens: Tokens
    """Tokens since growth over which their rate rises from zero; there, 250 steps."""
    ratio: Positive = 1.3
    """What it rises to, and stays at, in learning rates of the parameters that are old."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run, trained with one model."""

    tokens: Tokens | None = None
    """Length in tokens, rounded up to whole steps."""
    fraction: Annotated[float, Real(more_than=0, less_than=1)] | None = None
    """Length as a fraction of the whole run, instead of `tokens`."""
    batch_size: Size
    """Sequences in each optimizer step, over all devices and microbatches."""
    accumulate: Size = 1
    """Microbatches that each step's batch is cut into."""
    until: EarlyStop = EarlyStop()
    """Early stopping. Learning rates follow the planned length."""
    growth: GrowthField | None = None
    """How this stage's model grows out of the stage before; the first stage has none."""
    optimizer_state: Annotated[Literal["reset", "grow", "keep"], OnlyWith("growth")] = "reset"
    """What growth does to the optimizer: starts it afresh (arXiv:2405.15319), grows its
    moments as the gradient grows, or keeps old moments as they are and zeroes new ones."""
    rewarm: Annotated[Rewarm | None, OnlyWith("growth")] = None
    """Warm-up of the parameters that growth has added."""
    scale_by_fan_in: Annotated[bool, OnlyWith("growth")] = False
    """Whether the learning rate of a matrix is divided by how many times its fan-in grew."""
    train_layers: Text = "all"
    """Layers that learn: `all`; `new`, those that growth has added; or their numbers from 1,
    as in `(7..12)`. Unless all do, the embedding does not, and head and final norm do."""
    peak_learning_rate: Rate | None = None
    """Peak learning rate; by default the optimizer's."""
    schedule: Schedule | None = None
    """Learning-rate schedule; by default the optimizer's."""
    mesh: MeshConfig | None = None
    """Mesh of this stage; by default the run's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss, measured at intervals, at the end, and on both sides of each growth."""

    every_tokens: Tokens
    """Tokens between two evaluations."""
    num_sequences: Annotated[int, Whole(at_least=1, at_most=2**31 - 1)]
    """Held-out sequences of each evaluation, always the same ones."""
    batch_size: Size
    """Sequences evaluated at a time, over all devices."""
    layers: bool = False
    """Whether each evaluation, and each side of a growth, also measures every layer: how near
    it is to the other copies of its source, what it adds, and how large its weights are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Growth tried out on a copy, while the model before it trains."""

    at_tokens: tuple[Tokens, ...] = ()
    """Tokens of the run at which a copy grows as the next stage does, and trains for a lag."""
    lag_tokens: Annotated[Tokens | None, OnlyWith("at_tokens")] = None
    """Tokens of the lag, after which the copy's held-out loss is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Tasks of lm-evaluation-harness that the model is scored on while it trains."""

    names: tuple[Text, ...] = ()
    """Tasks, or groups of them; without any, lm-evaluation-harness need not be there."""
    every_tokens: Annotated[Tokens | None, OnlyWith("names")] = None
    """Tokens between two rounds of them. One more comes at the end of the run."""
    directory: Annotated[Text | None, OnlyWith("names")] = None
    """Directory of further tasks, as YAML files."""
    num_fewshot: Annotated[Count | None, OnlyWith("names")] = None
    """Solved examples before each question; by default as many as each task has."""
    limit: Annotated[Tokens | None, OnlyWith("names")] = None
    """Documents of each task, the first ones; by default all."""
    batch_size: Annotated[Size, OnlyWith("names")] = 32
    """Texts that are scored together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_tokens: Tokens
    """Tokens between two checkpoints. The end of each stage is always saved."""
    keep_last: Size = 2
    """Most recent checkpoints of a stage that are kept; its last one always is."""
    keep_every_tokens: Tokens | None = None
    """Checkpoints that are the first past a multiple of this are kept for good."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """When and where metrics are written; `metrics.jsonl` in the run directory always is."""

    every_tokens: Tokens
    """Tokens between two rows of metrics."""
    tensorboard: bool = True
    """Whether TensorBoard events are written into the run directory."""
    wandb_project: Text | None = None
    """Weights & Biases project to log to; needs `pip install wandb`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """A run: one model that may grow from stage to stage."""

    model: ModelConfig
    """The model that `model_is` says; the others follow from it and the growths."""
    model_is: Literal["source", "target"] = "target"
    """Whether `model` is the model of the last stage (target) or of the first (source)."""
    data: DataConfig
    """Where sequences come from."""
    optimizer: OptimizerConfig
    """How parameters are updated."""
    mesh: MeshConfig = MeshConfig()
    """How arrays are laid out over devices."""
    stages: Annotated[tuple[Stage, ...], Length(at_most=256)]
    """The parts of the run, in order."""
    init_from: Text | None = None
    """Where the first stage's parameters come from: a run, a checkpoint, or a folder of
    transformers. The optimizer, the data and the counts start afresh."""
    evaluation: EvaluationConfig
    """Held-out evaluation."""
    probes: ProbeConfig = ProbeConfig()
    """Growth tried out before its time."""
    tasks: TasksConfig = TasksConfig()
    """Scores on tasks."""
    checkpoints: CheckpointConfig
    """Checkpoints."""
    logging: LoggingConfig
    """Metrics."""
    platform: Literal["any", "accelerator"] = "any"
    """Where the run may start: wherever JAX does, or not on a CPU, which would crawl."""
    seed: Seed = 0
    """Seed of the initial parameters and of the order of the data."""
    workdir: Text
    """Directory of the run; starting the same command again resumes what is in it."""

    def __post_init__(self):
        super().__post_init__()
        keep, every = self.checkpoints.keep_every_tokens, self.checkpoints.every_tokens
        if keep is not None and keep % every:
            raise UserError(
                f"checkpoints.keep_every_tokens is {keep}; it must be a multiple of "
                f"checkpoints.every_tokens {every}."
            )
        _check_moments(self.optimizer)


def _check_moments(optimizer: OptimizerConfig) -> None:
    """Raises UserError where bfloat16 would round away what a step does to a moment.

    A moment stays where it is as long as steps change it by less than half of its last bit,
    2**-8 of it: up to 2**-8 / (1 - decay) from where it belongs, a fifth at 0.98. From 0.996
    on, the second moment cannot fall at all.
    """
    if optimizer.moments_dtype == "float32":
        return
    decays = {"b1": optimizer.b1, "b2": optimizer.b2}
    if optimizer.name == "muon":
        decays["momentum"] = optimizer.momentum
    for field, decay in decays.items():
        if decay > MAX_BFLOAT16_DECAY:
            raise UserError(
                f"optimizer.{field} is {decay}, and optimizer.moments_dtype is 'bfloat16', "
                f"whose 8 bits lose changes as small as {1 - decay:.2g} of a moment; use at "
                f"most {MAX_BFLOAT16_DECAY}, or float32."
            )
