"""Three corpora, two stages with other shares, lengths and batches, on a CPU.

On Debian, after `apt-get install linux-doc-6.1 fortunes`, a tokenizer and three data sets:

    code=tfds:stackjax_stdlib
    docs='/usr/share/doc/linux-doc-6.1/html/_sources/**/*.rst.txt'
    prose='/usr/share/games/fortunes/*.u8'
    python -m stackjax.tokenizer $code "$docs" "$prose" --vocab-size 1024 \\
        --output data/mixture.json
    python -m stackjax.prepare $code data/code --tokenizer data/mixture.json
    python -m stackjax.prepare "$docs" data/docs --tokenizer data/mixture.json
    python -m stackjax.prepare "$prose" data/prose --tokenizer data/mixture.json \\
        --validation-fraction 0.1
    python -m stackjax.train --config configs/mixture_tiny.py

trains in about three minutes on two cores. The first stage reads mostly documentation; the second
has twice the layers and twice the length, moves to code within 200,000 tokens, and doubles its
batch after 400,000.
"""

from stackjax.config import (
    BatchStep,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    Schedule,
    SourceConfig,
    Stage,
)
from stackjax.growth import Stack
from stackjax.model import ModelConfig
from stackjax.optimizers import AdamW


def get_config() -> Config:
    """Returns the run."""
    sources = (
        SourceConfig(name="docs", path="data/docs", weight=3.0),
        SourceConfig(name="code", path="data/code", weight=1.0),
        SourceConfig(name="prose", path="data/prose", weight=0.5, max_epochs=4.0),
    )
    return Config(
        model=ModelConfig(
            vocab_size=1024,
            num_layers=6,
            embed_dim=64,
            mlp_dim=176,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
        ),
        data=DataConfig(sources=sources, seq_len=128),
        optimizer=AdamW(peak_learning_rate=4e-3, schedule=Schedule(warmup_tokens=80_000)),
        stages=(
            Stage(tokens=600_000, batch_size=16),
            Stage(
                tokens=800_000,
                batch_size=8,
                batch_steps=(BatchStep(from_tokens=400_000, batch_size=16),),
                seq_len=256,
                rope_theta=40_000.0,
                source_weights=(1.0, 3.0, 0.5),
                source_ramp_tokens=200_000,
                growth=Stack(factor=2),
            ),
        ),
        evaluation=EvaluationConfig(every_tokens=100_000, num_sequences=32, batch_size=32),
        checkpoints=CheckpointConfig(every_tokens=400_000),
        logging=LoggingConfig(every_tokens=40_000),
        workdir="runs/mixture_tiny",
    )
