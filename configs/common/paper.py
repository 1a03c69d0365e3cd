"""Shared settings of the runs of arXiv:2405.15319, from Table 1 and the released code.

Numbers are the paper's unless a comment says "ours". Every stage warms up over 3000 steps. The
cosine decays to a tenth of the peak over 300,000 steps (629 billion tokens); most runs end
earlier.
"""

import dataclasses

from common import scratch as scratch_run

from stackjax.analysis.architectures import BATCH_SIZE, DATA, PAPER, SEQ_LEN, WARMUP_STEPS
from stackjax.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    Schedule,
    Stage,
)
from stackjax.growth import Stack
from stackjax.optimizers import AdamW

STEP_TOKENS = SEQ_LEN * BATCH_SIZE
SCHEDULE = Schedule(
    warmup_tokens=WARMUP_STEPS * STEP_TOKENS, horizon_tokens=300_000 * STEP_TOKENS
)


def gstack(size: str, *, tokens: int, accumulate: int, schedule: Schedule = SCHEDULE) -> Config:
    """Returns the run with a quarter of the layers for 10 billion tokens, then stacking.

    Args:
      size: `410m`, `1b`, `3b` or `7b`.
      tokens: Tokens of the target (the paper's D).
      accumulate: Microbatches per step (ours; adapt it to your devices).
    """
    shape = PAPER[size]
    assert shape.rates is not None, "PAPER has rates"
    base = Stage(
        tokens=10_000_000_000,
        batch_size=BATCH_SIZE,
        accumulate=accumulate,
        peak_learning_rate=shape.rates.small,
    )
    return Config(
        model=shape.model(),
        data=DATA,
        optimizer=AdamW(peak_learning_rate=shape.rates.target, schedule=schedule),
        stages=(
            base,
            dataclasses.replace(
                base, tokens=tokens, growth=Stack(factor=4), peak_learning_rate=None
            ),
        ),
        # Intervals are ours.
        evaluation=EvaluationConfig(
            every_tokens=1_000_000_000, num_sequences=1024, batch_size=256
        ),
        checkpoints=CheckpointConfig(
            every_tokens=2_000_000_000, keep_last=2, keep_every_tokens=50_000_000_000
        ),
        logging=LoggingConfig(every_tokens=10 * STEP_TOKENS),
        platform="accelerator",
        seed=3407,
        workdir=f"runs/gstack_{size}",
    )


def scratch(size: str, grown: Config) -> Config:
    """Returns the run of a grown run's target from scratch, with equal FLOPs."""
    return scratch_run.of(grown, f"runs/scratch_{size}")
