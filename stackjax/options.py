"""The options of every command, without JAX; those of `train` are fields of `Config` too."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stackjax.config import GrowthField
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
"""The tasks that arXiv:2405.15319 reports."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeConfig(Checked):
    """How a run goes on after a bad loss or a damaged checkpoint."""

    resume_from: str = ""
    """Checkpoint to go back to: its step in the present phase, such as `400`, or with its
    phase, such as `stage_0/train/400`. Newer checkpoints and rows are discarded. The same
    command run again does not go back twice."""
    skip_examples: Count = 0
    """Examples of the data to leave out from there on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowConfig(Checked):
    """Grows the model of a checkpoint, or of a folder of transformers, outside of a run."""

    source: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run, a directory of checkpoints, or one of them; of several the newest grows. Or a
    folder of transformers: a Llama, Mistral, Qwen2 or Qwen3."""
    target: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Directory to write, as a checkpoint at step 0, or as a folder of transformers where
    SOURCE is one; it must be new, or empty."""
    growth: GrowthField
    """How the model grows: `stack(4)`."""
    optimizer_state: Literal["drop", "grow", "keep"] = "drop"
    """Whether the optimizer state is left out, its moments grow as the gradient does, or old
    moments stay as they are and new ones are zero."""
    config: Path | None = None
    """An experiment, whose held-out sequences are to be evaluated before and after."""
    seed: Seed = 0
    """Seed of what is new and random."""
    source_tokens: Count = 0
    """Tokens that the model of a folder was trained on, for its model card, where the folder
    does not say."""
    allow_nonfinite: bool = False
    """Whether weights and moments may be NaN or infinite."""


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
    """Tells where the model of a checkpoint comes from."""

    run: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run, a directory of checkpoints, or one of them; of several the newest. Or a folder of
    transformers."""
    json: bool = False
    """Whether to print it for machines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Sizes of mesh axes; those that are not given are the config's."""

    replica: Literal[-1] | Size | None = None
    """Copies of the parameters."""
    fsdp: Literal[-1] | Size | None = None
    """Shards of batch, parameters and optimizer state."""
    tensor: Literal[-1] | Size | None = None
    """Shards of heads, mlp and vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Checked):
    """Plans a run that grows: when, what each stage costs, and what it is likely to save."""

    params: Positive | None = None
    """Parameters of the target (N); an architecture is chosen for them."""
    config: Path | None = None
    """A config instead, whose last model, data, optimizer, batch and mesh are kept."""
    tokens: Positive | None = None
    """Budget as tokens of a run from scratch (D)."""
    flops: Positive | None = None
    """Budget as FLOPs of a run from scratch (C = 6 N D)."""
    device_hours: Positive | None = None
    """Budget as device-hours of a run from scratch; the speed must be known."""
    factor: Annotated[int, Whole(at_least=2, at_most=1000)] = 4
    """Growth factor (g) of non-embedding parameters, and of layers."""
    tokens_per_second: Positive | None = None
    """Speed of the target, over all devices."""
    benchmark: Path | None = None
    """Speed as `python -m scripts.benchmark` wrote it; of the small model too, if it is in."""
    devices: Size | None = None
    """Devices of the run; by default those of the mesh, or of the benchmark."""
    mesh: MeshSizes = MeshSizes()
    """Mesh of the run, for the memory on each device."""
    write: Path | None = None
    """Config file to write."""
    json: bool = False
    """Whether to print JSON, and nothing else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Checked):
    """Compares grown runs with runs from scratch of the same model, on the same data."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=10_000)]
    """Run directories, of one or more seeds; they need not have finished."""
    loss: LossName = "held_out"
    """Held-out loss, or the training loss, as arXiv:2405.15319 has it."""
    losses: tuple[Positive, ...] = ()
    """Losses to give the speed-up at; by default what all seeds of scratch have come down to
    at a quarter, half, three quarters and all of its FLOPs, and the last of the grown runs."""
    budgets: tuple[Positive, ...] = ()
    """FLOPs (6ND) to give the losses at; by default the same shares of what both have spent."""
    output: Path = Path("runs/comparison")
    """Directory for comparison.md, comparison.json, index.html and the pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoflopConfig(Checked):
    """Finds the best timing and the best factor of growth among runs, at equal FLOPs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=10_000)]
    """Run directories: grown at several times or by several factors, and from scratch; of one
    or more sizes, and of one or more seeds."""
    loss: LossName = "held_out"
    """Held-out loss, or the training loss."""
    budgets: tuple[Positive, ...] = ()
    """FLOPs (6ND) to look at; by default half, and all, of what all runs of a size have
    spent. Before the end, the learning rate of a run has not yet come down."""
    output: Path = Path("runs/isoflop")
    """Directory for isoflop.md, isoflop.json, index.html and the pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig(Checked):
    """Fits laws to the ends of grown runs and of runs from scratch, and draws them out."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=10_000)]
    """Run directories, all finished: their last loss counts."""
    loss: LossName = "held_out"
    """Held-out loss, or the training loss."""
    flops: tuple[Positive, ...] = ()
    """FLOPs (6ND) to foretell the speed-up at; by default 1 to 1000 times those of the largest
    run."""
    output: Path = Path("runs/scale")
    """Directory for scale.md, scale.json, index.html and the pictures."""
