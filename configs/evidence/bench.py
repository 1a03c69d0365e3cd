"""The bench of docs/evidence.md: models of 0.1M parameters, real text, a CPU.

On Debian, after `apt-get install linux-doc-6.1 python3-doc`, a tokenizer with 1,024 entries and
three data sets with 20M tokens:

    code=tfds:stackjax_stdlib
    kernel='/usr/share/doc/linux-doc-6.1/html/_sources/**/*.rst.txt'
    manual='/usr/share/doc/python3.??/html/_sources/**/*.rst.txt'
    python -m stackjax.tokenizer $code "$kernel" "$manual" --vocab-size 1024 \\
        --output data/evidence.json
    for name in code kernel manual; do
        python -m stackjax.prepare "${!name}" data/evidence_$name \\
            --tokenizer data/evidence.json --validation-fraction 0.03
    done

All runs of a length have the FLOPs (6ND) of the target from scratch, source included. Lengths
are in tokens per parameter of the target without embedding.
"""

import dataclasses
from typing import Literal

from stackjax.analysis.budget import for_flops
from stackjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    Schedule,
    SourceConfig,
    Stage,
)
from stackjax.growth import parse_growth
from stackjax.model import ModelConfig
from stackjax.model.config import CompleteP
from stackjax.model.flops import flops_6nd, num_layer_params
from stackjax.optimizers import AdamW, Muon, Optimizer

Shape = Literal["wsd", "cosine"]
BASE_LAYERS = 2
"""Layers of CompleteP's base model, and of the source of a fourfold growth."""
ADAMW = AdamW(peak_learning_rate=4e-3)
MUON = Muon(peak_learning_rate=4e-3)


def target(parametrization: str = "standard", layers: int = 8) -> ModelConfig:
    """Returns the target's config; with 8 layers, 0.1M parameters without embedding."""
    model = ModelConfig(
        vocab_size=1024,
        num_layers=layers,
        embed_dim=32,
        mlp_dim=88,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        tie_head=True,
    )
    if parametrization == "standard":
        return model
    base = dataclasses.replace(model, num_layers=BASE_LAYERS)
    return dataclasses.replace(model, completep=CompleteP.of(base))


def tokens(tokens_per_param: int, layers: int = 8) -> int:
    """Returns the tokens of the target from scratch."""
    return tokens_per_param * num_layer_params(target(layers=layers))


def run(
    growth: str,
    tokens_per_param: int,
    *,
    parametrization: str = "standard",
    layers: int = 8,
    share: float = 0.15,
    shape: Shape = "wsd",
    optimizer: Optimizer = ADAMW,
    state: Literal["reset", "grow", "keep"] = "reset",
    warmup: float = 0.04,
) -> Config:
    """Returns a run. Fractions are of the tokens from scratch.

    The learning rate warms up over 4 %, and decays to zero: under WSD over the last 20 %, or
    as half a cosine over the last stage. The source keeps the peak rate until growth.

    Args:
      growth: An operator, or `scratch`.
      share: FLOPs (6ND) of the source, relative to all.
      state: Optimizer state after growth.
      warmup: Warm-up after growth.
    """
    model, length = target(parametrization, layers), tokens(tokens_per_param, layers)
    flops = length * flops_6nd(model)
    is_grown = growth != "scratch"
    warmup_tokens = int((warmup if is_grown else 0.04) * length)
    # Late growth decays over all that is left; the last stage ends with whole steps.
    left = length if not is_grown else round(0.99 * (1 - share) * length)
    last = Stage(
        tokens=length,
        batch_size=4,
        growth=parse_growth(growth) if is_grown else None,
        optimizer_state=state,
        schedule=Schedule(
            shape=shape,
            warmup_tokens=warmup_tokens,
            decay_tokens=min(length // 5, left - warmup_tokens) if shape == "wsd" else None,
            final_fraction=0.0,
        ),
    )
    stages = (last,)
    if last.growth is not None:
        source = last.growth.source_config(model)
        first = Stage(
            tokens=round(share * flops / flops_6nd(source)),
            batch_size=4,
            schedule=Schedule(shape="constant", warmup_tokens=length // 25),
        )
        stages = (first, last)
    config = Config(
        model=model,
        data=DataConfig(
            sources=tuple(
                SourceConfig(name=name, path=f"data/evidence_{name}", weight=weight)
                for name, weight in (("code", 1.0), ("kernel", 2.4), ("manual", 1.0))
            ),
            seq_len=128,
        ),
        optimizer=optimizer,
        stages=stages,
        evaluation=EvaluationConfig(
            every_tokens=length // 10, num_sequences=128, batch_size=16
        ),
        checkpoints=CheckpointConfig(every_tokens=length, keep_last=1),
        logging=LoggingConfig(every_tokens=length // 20, tensorboard=False),
        workdir="runs/evidence",
    )
    return for_flops(config, flops)
