"""Command options. Importing this module does not import JAX."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stackjax.config import GrowthField
from stackjax.growth.base import OptimizerState
from stackjax.model.config import Dim
from stackjax.runtime.constraints import Checked, OnlyWith
from stackjax.runtime.numbers import (
    Count,
    NonNegative,
    Positive,
    Seed,
    Size,
    Text,
    Tokens,
)
from stackjax.runtime.ranges import Length, Real, Whole

LossName = Literal["held_out", "train"]
"""Validation loss, or training loss."""

ACCURACY_TASKS = (
    "lambada_openai",
    "arc_challenge",
    "arc_easy",
    "logiqa",
    "piqa",
    "sciq",
    "winogrande",
)
"""The tasks in the mean accuracy of arXiv:2405.15319, by their names in the harness."""

WIKITEXT = "wikitext"

PAPER_TASKS = (*ACCURACY_TASKS, WIKITEXT)
"""The tasks in arXiv:2405.15319."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeConfig(Checked):
    """Resuming after a bad loss or a damaged checkpoint."""

    resume_from: str = ""
    """Checkpoint to resume from: a step in the current phase, such as `400`, or a phase and a
    step, such as `stage_0/train/400`. Newer checkpoints and rows are deleted. Running the same
    command again does not go back twice."""
    skip_examples: Count = 0
    """Training examples to skip from there on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(Checked):
    """Options for training, besides the config."""

    resume: Annotated[ResumeConfig, tyro.conf.arg(name="")] = ResumeConfig()
    """Resuming after a bad loss or a damaged checkpoint."""
    dry_run: bool = False
    """Stop before training: check config and data, compile the train step of every phase, and
    show its memory on each device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig(Checked):
    """Compilation for devices that are not present."""

    devices: str = ""
    """Devices: `v5p:2x2x2`, `v5e:16x16*2` for two slices, `h100:8`, or `h200:8x4` for 4 hosts
    of 8. TPUs v5e, v5p, v6e, tpu7x; GPUs h100, h200, a100-40, a100-80, b200."""
    target: Path | None = None
    """A GPU's own description, instead of the package's: a program on this GPU writes a file
    `*.gpu_target_config.pbtxt` with XLA_FLAGS=--xla_dump_to=DIRECTORY."""
    json: Path | None = None
    """JSON file to write, with all numbers."""
    search: bool = False
    """For each stage, search the mesh, accumulate, remat and loss_chunk with the shortest
    estimated step that fits. This compiles some twenty steps per stage."""
    write: Annotated[Path | None, OnlyWith("search")] = None
    """Config file to write, with the result of the search."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowConfig(Checked):
    """Grows a checkpoint or a Hugging Face folder outside of a run."""

    source: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run or a directory of checkpoints (the newest is used), a checkpoint, or a Hugging
    Face folder (Llama, Mistral, Qwen2 or Qwen3)."""
    target: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Directory to write, new or empty: a checkpoint at step 0 for a checkpoint, a folder for
    a folder."""
    growth: GrowthField
    """Growth operator, such as `stack(4)`."""
    optimizer_state: OptimizerState = "reset"
    """Reset (no optimizer state in the result), grow the moments with the gradients, or keep
    old moments and zero new moments."""
    config: Path | None = None
    """Config file with growth operators for --growth, and with validation data: a checkpoint
    is evaluated before and after growth."""
    seed: Seed = 0
    """Seed for new random parameters."""
    source_tokens: Count = 0
    """Training tokens of the source model, for a folder without stackjax's lineage."""
    allow_nonfinite: bool = False
    """Accept NaN and infinite weights and moments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig(Checked):
    """Converts a model to or from a Hugging Face folder."""

    source: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Import: a Hugging Face folder (Llama, Mistral, Qwen2 or Qwen3), or a lit-gpt .pth file
    from arXiv:2405.15319. Export: a run, a directory of checkpoints, or a checkpoint."""
    target: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Directory to write, new or empty: a checkpoint on import, a folder on export."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of exported weights. `auto` uses each tensor's type in the original folder, or
    float32 for a model trained from scratch."""
    tokenizer: Text | None = None
    """Tokenizer to export: `bytes`, a file or a folder; by default the run's own."""
    source_tokens: Count = 0
    """Training tokens of an imported model, for a folder without stackjax's lineage."""
    head_dim: Dim | None = None
    """Channels per head in a .pth file; by default as in the paper's model of that width."""
    allow_nonfinite: bool = False
    """Accept NaN and infinite weights."""
    verify: bool = False
    """Compare logits on random tokens in both libraries; needs requirements-interop.txt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """Sampling parameters, applied in this order."""

    temperature: NonNegative = 1.0
    """Divisor of the logits; 0 always takes the most likely token."""
    top_k: Annotated[Size | None, OnlyWith("temperature")] = None
    """Draw from this many most likely tokens; by default from all."""
    top_p: Annotated[float, Real(more_than=0, at_most=1), OnlyWith("temperature")] = 1.0
    """Draw from the smallest set of most likely tokens with this total probability."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Checked):
    """Generates text with a trained model."""

    model: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run or a directory of checkpoints (the newest is used), a checkpoint, or a Hugging
    Face folder."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeatable. By default a single empty prompt."""
    prompt_file: Path | None = None
    """File with more prompts, one per line; an empty line is an empty prompt."""
    tokenizer: Text | None = None
    """`bytes`, a file or a folder; by default the model's own tokenizer."""
    max_tokens: Size = 100
    """Maximum number of new tokens per prompt."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    """Sampling parameters."""
    seed: Annotated[Seed, OnlyWith("sampling.temperature")] = 0
    """Random seed."""
    json: bool = False
    """Print a JSON object per prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """Evaluates a model on lm-evaluation-harness tasks."""

    model: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run or a directory of checkpoints (the newest is used), a checkpoint, or a Hugging
    Face folder."""
    tasks: str = ",".join(PAPER_TASKS)
    """Task or group names, separated by commas."""
    task_dir: Path | None = None
    """Directory with additional lm-evaluation-harness tasks (YAML files)."""
    tokenizer: Text | None = None
    """`bytes`, a file or a folder; by default the model's own tokenizer."""
    num_fewshot: Count | None = None
    """Solved examples before each question; by default as each task says."""
    limit: Tokens | None = None
    """Use only this many documents per task; by default all."""
    batch_size: Size = 32
    """Texts per batch."""
    output: Path = Path("results.json")
    """New JSON file for the results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(Checked):
    """Shows the lineage of a checkpoint or a Hugging Face folder."""

    run: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run or a directory of checkpoints (the newest is used), a checkpoint, or a Hugging
    Face folder."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Mesh axis sizes; by default as in the config."""

    replica: Literal[-1] | Size | None = None
    """Copies of the parameters."""
    fsdp: Literal[-1] | Size | None = None
    """Shards of batch, parameters and optimizer state."""
    tensor: Literal[-1] | Size | None = None
    """Shards of heads, mlp and vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Checked):
    """Plans a run with growth: timing, cost per stage and expected savings."""

    params: Positive | None = None
    """Target parameters (N); the command chooses an architecture."""
    config: Path | None = None
    """Config file instead of `params`: last model, data, optimizer, batch and mesh."""
    tokens: Positive | None = None
    """Budget in tokens for a run from scratch (D)."""
    flops: Positive | None = None
    """Budget in FLOPs for a run from scratch (C = 6 N D)."""
    device_hours: Positive | None = None
    """Budget in device-hours for a run from scratch; needs a speed."""
    factor: Annotated[int, Whole(at_least=2, at_most=1000)] = 4
    """Growth factor (g) in non-embedding parameters and layers."""
    tokens_per_second: Positive | None = None
    """Training speed of the target, over all devices."""
    benchmark: Path | None = None
    """Training speeds in a file from `python -m scripts.benchmark`."""
    devices: Size | None = None
    """Number of devices; by default from the mesh or the benchmark."""
    mesh: MeshSizes = MeshSizes()
    """Mesh, for the memory per device."""
    write: Path | None = None
    """Config file to write."""
    json: bool = False
    """Print JSON only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Checked):
    """Compares grown runs with runs from scratch: same model, same data."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=10_000)]
    """Run directories, finished or not, with one or more seeds."""
    loss: LossName = "held_out"
    """Validation loss, or training loss as in arXiv:2405.15319."""
    losses: tuple[Positive, ...] = ()
    """Losses for the speed-ups; by default the highest loss over scratch seeds at a quarter,
    half, three quarters and all of scratch's FLOPs, and the final loss of the grown runs."""
    budgets: tuple[Positive, ...] = ()
    """FLOPs (6ND) for the losses; by default the same fractions of the smaller spending."""
    output: Path = Path("runs/comparison")
    """Directory for comparison.md, comparison.json, index.html and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoflopConfig(Checked):
    """Finds the best growth timing and factor among runs, at equal FLOPs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=10_000)]
    """Run directories: from scratch, and grown at several times or by several factors, with
    one or more sizes and seeds."""
    loss: LossName = "held_out"
    """Validation loss, or training loss."""
    budgets: tuple[Positive, ...] = ()
    """Budgets in FLOPs (6ND); by default half and all FLOPs that every run with a size has
    spent. Before the end of a run, the learning rate has not decayed yet."""
    output: Path = Path("runs/isoflop")
    """Directory for isoflop.md, isoflop.json, index.html and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig(Checked):
    """Fits scaling laws to final losses of grown runs and runs from scratch."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=10_000)]
    """Finished run directories; the final loss counts."""
    loss: LossName = "held_out"
    """Validation loss, or training loss."""
    flops: tuple[Positive, ...] = ()
    """FLOPs (6ND) for extrapolated speed-ups; by default 1 to 1000 times the largest run."""
    output: Path = Path("runs/scale")
    """Directory for scale.md, scale.json, index.html and figures."""
