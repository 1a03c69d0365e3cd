"""G_stack at 70B: 20 layers for 42.5B tokens, then 80 for 2T, as LLaMA 2 (arXiv:2307.09288).

    python -m stackjax.train --config configs/gstack_70b.py

on GPU hosts or a TPU slice, with the same command on every host. The target has 68.98B parameters.
The small model's tokens are from `python -m stackjax.plan --params 70e9 --tokens 2e12`: the law of
arXiv:2405.15319, far outside of its fit. Growth at this size is not measured.
"""

import dataclasses

from common.paper import gstack

from stackjax.analysis.architectures import choose_model
from stackjax.config import Config, Schedule

SEQ_LEN, BATCH_SIZE = 4096, 1024
RATE = 1.5e-4
"""LLaMA 2's sequence length, batch size (4M tokens) and peak learning rate."""
SMALL_RATE = 3e-4
"""LLaMA 2's peak at 13B; the small model has 17.6B parameters."""
SMALL_TOKENS, TOKENS = 42_500_000_000, 2_000_000_000_000


def get_config() -> Config:
    """Returns the run."""
    model, _ = choose_model(70e9)
    warmup_tokens = 2000 * SEQ_LEN * BATCH_SIZE
    schedule = Schedule(warmup_tokens=warmup_tokens, horizon_tokens=TOKENS)
    config = gstack("7b", tokens=TOKENS, accumulate=4, schedule=schedule)
    small = dataclasses.replace(
        config.stages[0], tokens=SMALL_TOKENS, peak_learning_rate=SMALL_RATE
    )
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, seq_len=SEQ_LEN),
        optimizer=dataclasses.replace(config.optimizer, peak_learning_rate=RATE),
        stages=(small, config.stages[1]),
        workdir="runs/gstack_70b",
    )
