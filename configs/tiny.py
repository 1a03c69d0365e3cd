"""G_stack on a CPU (arXiv:2405.15319): 3 layers for 0.6M bytes, then 12 for 0.8M more.

    python -m stackjax.train --config configs/tiny.py

trains on the bytes of the Python standard library, in about three minutes on two cores. Expect a
held-out loss of about 1.51 nats per byte at 3.7e12 FLOPs (6ND), against 1.64 for
tiny_scratch.py. Each stage warms up to a learning rate of 4e-3 over 80,000 bytes, then decays to a
tenth by a cosine.
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
from stackjax.growth import Stack
from stackjax.model import ModelConfig
from stackjax.optimizers import AdamW


def get_config() -> Config:
    """Returns the run."""
    return Config(
        model=ModelConfig(
            vocab_size=256,
            num_layers=12,
            embed_dim=64,
            mlp_dim=176,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
        ),
        data=DataConfig(path="data/stdlib", seq_len=128, corpus="stdlib"),
        optimizer=AdamW(peak_learning_rate=4e-3, schedule=Schedule(warmup_tokens=80_000)),
        stages=(
            Stage(tokens=600_000, batch_size=16),
            Stage(tokens=800_000, batch_size=16, growth=Stack(factor=4)),
        ),
        evaluation=EvaluationConfig(
            every_tokens=100_000, num_sequences=256, batch_size=64, layers=True
        ),
        checkpoints=CheckpointConfig(every_tokens=400_000),
        logging=LoggingConfig(every_tokens=40_000),
        workdir="runs/tiny",
    )
