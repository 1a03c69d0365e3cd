"""What the runs of arXiv:2405.15319 share, by its Table 1 and its released code.

Not an experiment: the files beside it are. The numbers are the paper's unless a comment
says "ours". Sequences of 2048 tokens, 1024 of them a step, 3000 steps of warm-up in every
stage, then a cosine to a tenth of the peak whose horizon is 300,000 steps (629 billion
tokens), which most runs end before.
"""

import dataclasses

from stackjax.analysis.budget import scratch_tokens
from stackjax.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    Schedule,
    Stage,
)
from stackjax.data.config import DataConfig
from stackjax.growth import Stack
from stackjax.model import ModelConfig
from stackjax.optimizers import AdamW

SEQ_LEN = 2048
BATCH_SIZE = 1024
STEP_TOKENS = SEQ_LEN * BATCH_SIZE
SCHEDULE = Schedule(warmup_tokens=3_000 * STEP_TOKENS, horizon_tokens=300_000 * STEP_TOKENS)


def model_config(
    *,
    num_layers: int,
    embed_dim: int,
    mlp_dim: int,
    num_heads: int,
    num_kv_heads: int,
) -> ModelConfig:
    """Returns one of the paper's models; how it is executed is ours."""
    return ModelConfig(
        vocab_size=32_000,
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=embed_dim // num_heads,
        remat="dots",
    )


def gstack(
    name: str,
    model: ModelConfig,
    *,
    tokens: int,
    base_peak_learning_rate: float,
    peak_learning_rate: float,
    accumulate: int,
    schedule: Schedule = SCHEDULE,
) -> Config:
    """Returns the run that trains a quarter of the layers on 10 billion tokens and stacks.

    Args:
      model: The target.
      tokens: How long the target trains (the paper's D).
      accumulate: Microbatches of a step (ours; change it freely to fit the devices).
    """
    base = Stage(
        tokens=10_000_000_000,
        batch_size=BATCH_SIZE,
        accumulate=accumulate,
        peak_learning_rate=base_peak_learning_rate,
    )
    return Config(
        model=model,
        # SlimPajama-627B, the tokenizer of LLaMA; see docs/data.md.
        data=DataConfig(path="data/slimpajama", seq_len=SEQ_LEN, num_workers=4),
        optimizer=AdamW(peak_learning_rate=peak_learning_rate, schedule=schedule),
        stages=(
            base,
            dataclasses.replace(
                base, tokens=tokens, growth=Stack(factor=4), peak_learning_rate=None
            ),
        ),
        # How often the run looks at itself is ours.
        evaluation=EvaluationConfig(
            every_tokens=1_000_000_000, num_sequences=1024, batch_size=256
        ),
        checkpoints=CheckpointConfig(
            every_tokens=2_000_000_000, keep_last=2, keep_every_tokens=50_000_000_000
        ),
        logging=LoggingConfig(every_tokens=10 * STEP_TOKENS),
        platform="accelerator",
        seed=3407,
        workdir=f"runs/gstack_{name}",
    )


def scratch(name: str, grown: Config) -> Config:
    """Returns the run that trains a grown run's target from scratch, for the same FLOPs."""
    stage = dataclasses.replace(grown.stages[-1], tokens=scratch_tokens(grown), growth=None)
    return dataclasses.replace(grown, stages=(stage,), workdir=f"runs/scratch_{name}")
