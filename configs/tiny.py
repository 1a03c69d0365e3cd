"""G_stack on a CPU: draft."""

from stackjax.config import *
from stackjax.growth import Stack
from stackjax.model.config import ModelConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=256,
            num_layers=12,
            embed_dim=128,
            mlp_dim=352,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            scan_unroll=12,
        ),
        data=DataConfig(path="data/stdlib", seq_len=256, corpus="stdlib"),
        optimizer=OptimizerConfig(
            peak_learning_rate=2e-3, schedule=Schedule(warmup_tokens=50_000)
        ),
        stages=(
            Stage(tokens=500_000, batch_size=16),
            Stage(tokens=500_000, batch_size=16, growth=Stack(factor=4)),
        ),
        evaluation=EvaluationConfig(every_tokens=250_000, num_sequences=64, batch_size=32),
        checkpoints=CheckpointConfig(every_tokens=250_000),
        logging=LoggingConfig(every_tokens=40_000),
        workdir="runs/tiny",
    )
