"""The base run of learning-rate transfer on a CPU: 2 layers x 32 channels, 0.5M bytes.

    python -m scripts.transfer configs/transfer_tiny.py --jobs 2

trains 1, 2, 4 and 8 times the layers and 1, 2, 4 and 8 times the channels at seven learning rates,
as standard models and under CompleteP (arXiv:2505.01618). The base run alone:

    python -m stackjax.train --config configs/transfer_tiny.py
"""

from stackjax.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    Schedule,
    Stage,
)
from stackjax.data.config import DataConfig
from stackjax.model import ModelConfig
from stackjax.optimizers import AdamW


def get_config() -> Config:
    """Returns the base run."""
    return Config(
        model=ModelConfig(
            vocab_size=256,
            num_layers=2,
            embed_dim=32,
            mlp_dim=88,
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
        ),
        data=DataConfig(path="data/stdlib", seq_len=128, corpus="stdlib"),
        optimizer=AdamW(peak_learning_rate=8e-3, schedule=Schedule(warmup_tokens=50_000)),
        stages=(Stage(tokens=500_000, batch_size=16),),
        evaluation=EvaluationConfig(every_tokens=250_000, num_sequences=256, batch_size=64),
        checkpoints=CheckpointConfig(every_tokens=500_000),
        logging=LoggingConfig(every_tokens=50_000, tensorboard=False),
        workdir="runs/transfer_tiny/base",
    )
