"""Stacking in nanochat, with switches for its deviations from arXiv:2405.15319."""

import dataclasses
from typing import Literal

from parts import lengths

from stackjax.analysis.budget import for_flops
from stackjax.config import Config, Schedule, Stage
from stackjax.growth import Stack
from stackjax.model import ModelConfig
from stackjax.model.flops import flops_6nd, num_params
from stackjax.optimizers import AdamW, Muon

TOKENS_PER_PARAM = 10.5
"""Tokens of the target from scratch, per parameter; this is the budget."""
TIMINGS = (1.25, 2.25, 3.25, 4.25, 5.25)
"""Tokens of the small model, per parameter of the small model."""
_PAPER_STEPS = 46_500
"""Steps of the paper's 1.1B run after growth; warm-up and horizon are relative to it."""
WARMUP, HORIZON = 3_000 / _PAPER_STEPS, 300_000 / _PAPER_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Four switches; the defaults are the replication."""

    factor: int = 2
    """Growth factor; 4 in the paper."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """AdamW in the paper."""
    optimizer_state: Literal["reset", "grow", "keep"] = "reset"
    """Optimizer state after growth. The paper does not say; its code resets."""
    schedule: Literal["linear", "paper"] = "linear"
    """`linear`: constant, then linear decay to 0 from the first step after growth. `paper`:
    warm-up in each stage, and the beginning of a long cosine."""


SETTINGS = {
    "replication": Setting(),
    "factor 4": Setting(factor=4),
    "AdamW": Setting(optimizer="adamw"),
    "grown state": Setting(optimizer_state="grow"),
    "kept state": Setting(optimizer_state="keep"),
    "long cosine": Setting(schedule="paper"),
    "all four": Setting(factor=4, optimizer="adamw", optimizer_state="grow", schedule="paper"),
}
SCRATCH = {
    "scratch": Setting(),
    "AdamW, scratch": Setting(optimizer="adamw"),
    "long cosine, scratch": Setting(schedule="paper"),
    "AdamW and long cosine, scratch": Setting(optimizer="adamw", schedule="paper"),
}


def scaling_params(model: ModelConfig) -> int:
    """Returns the parameters that nanochat counts: without the embedding."""
    return num_params(model) - model.vocab_size * model.embed_dim


def budget(model: ModelConfig) -> float:
    """Returns the FLOPs of a target from scratch."""
    return flops_6nd(model) * TOKENS_PER_PARAM * scaling_params(model)


def grown(config: Config, setting: Setting, timing: float, *, muon: float) -> Config:
    """Returns the run with stacking.

    Args:
      config: A run of the target from scratch, with AdamW.
      timing: Tokens of the small model per parameter.
      muon: Peak learning rate with Muon.
    """
    growth = Stack(setting.factor)
    tokens = int(timing * scaling_params(growth.source_config(config.model)))
    base = dataclasses.replace(config.stages[0], tokens=tokens)
    last = dataclasses.replace(
        config.stages[0], growth=growth, optimizer_state=setting.optimizer_state
    )
    return _run(config, setting, (base, last), muon)


def runs(config: Config, *, muon: float, seed: int) -> dict[str, Config]:
    """Returns the replication at all timings, the switches at the last timing, and scratch.

    See `grown` for the arguments.
    """
    *earlier, timing = TIMINGS
    found = {
        f"replication, {each} tokens": grown(config, Setting(), each, muon=muon)
        for each in earlier
    }
    for name, setting in SETTINGS.items():
        found[f"{name}, {timing} tokens"] = grown(config, setting, timing, muon=muon)
    for name, setting in SCRATCH.items():
        found[name] = _run(config, setting, config.stages, muon)
    return lengths.cells(found, flops=budget(config.model), seed=seed)


def _run(config: Config, setting: Setting, stages: tuple[Stage, ...], muon: float) -> Config:
    """Returns the run with the budget's length, the setting's optimizer and schedules."""
    run = for_flops(dataclasses.replace(config, stages=stages), budget(config.model))
    optimizer = AdamW(peak_learning_rate=config.optimizer.peak_learning_rate)
    if setting.optimizer == "muon":
        optimizer = Muon(peak_learning_rate=muon)
    scheduled = tuple(
        dataclasses.replace(stage, schedule=_schedule(setting, run, stage))
        for stage in run.stages
    )
    return dataclasses.replace(run, optimizer=optimizer, stages=scheduled)


def _schedule(setting: Setting, run: Config, stage: Stage) -> Schedule:
    if setting.schedule == "paper":
        tokens = TOKENS_PER_PARAM * scaling_params(run.model)
        return Schedule(
            warmup_tokens=int(WARMUP * tokens), horizon_tokens=int(HORIZON * tokens)
        )
    if stage is not run.stages[-1]:
        return Schedule(shape="constant")
    assert stage.tokens is not None, "for_flops sets it"
    # From scratch, nanochat decays over the second half.
    decay = stage.tokens if stage.growth is not None else stage.tokens // 2
    return Schedule(shape="wsd", decay_tokens=decay, final_fraction=0.0)
