"""draft"""

from stackjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    Schedule,
    Stage,
)
from stackjax.growth import Stack
from stackjax.model.config import ModelConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=256,
            num_layers=12,
            embed_dim=64,
            mlp_dim=176,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            scan_unroll=12,
        ),
        data=DataConfig(path="data/stdlib", seq_len=128, corpus="stdlib"),
        optimizer=OptimizerConfig(
            peak_learning_rate=4e-3, schedule=Schedule(warmup_tokens=80_000)
        ),
        stages=(
            Stage(tokens=800_000, batch_size=16),
            Stage(tokens=1_200_000, batch_size=16, growth=Stack(factor=4)),
        ),
        evaluation=EvaluationConfig(every_tokens=200_000, num_sequences=512, batch_size=64),
        checkpoints=CheckpointConfig(every_tokens=500_000),
        logging=LoggingConfig(every_tokens=40_000),
        workdir="runs/tiny",
    )
