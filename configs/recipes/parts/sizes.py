"""Runs from scratch at several sizes; a recipe replaces their only stage.

Batches, intervals and learning rates are ours unless a comment says whose.
"""

from stackjax.analysis.architectures import DATA, PAPER
from stackjax.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    Stage,
)
from stackjax.data.config import DataConfig
from stackjax.model import ModelConfig
from stackjax.optimizers import AdamW

HEAD_DIM = 64


def tiny(name: str, *, num_layers: int = 12, embed_dim: int = 64) -> Config:
    """Returns a run of a CPU model on the bytes of the Python standard library."""
    return Config(
        model=_llama(
            vocab_size=256,
            num_layers=num_layers,
            embed_dim=embed_dim,
            mlp_dim=embed_dim * 11 // 4,
            head_dim=embed_dim // 2,
        ),
        data=DataConfig(path="data/stdlib", seq_len=128, corpus="stdlib"),
        optimizer=AdamW(peak_learning_rate=4e-3),
        stages=(Stage(tokens=1_000_000, batch_size=16),),
        evaluation=EvaluationConfig(every_tokens=200_000, num_sequences=256, batch_size=64),
        checkpoints=CheckpointConfig(every_tokens=400_000),
        logging=LoggingConfig(every_tokens=40_000),
        workdir=f"runs/recipes/{name}",
    )


def gpt2(name: str) -> Config:
    """Returns a run with 124M parameters: GPT-2's sizes in a LLaMA-style model.

    The SwiGLU has 2048 units, as many parameters as GPT-2's 3072 without gate.
    """
    model = _llama(vocab_size=50_257, num_layers=12, embed_dim=768, mlp_dim=2048, tie_head=True)
    data = DataConfig(path="data/openwebtext", seq_len=1024, num_workers=4)
    return _accelerated(name, model, data, batch_size=512, accumulate=8, peak=6e-4)


def nanochat(name: str) -> Config:
    """Returns a run of nanochat's d12: 12 layers x 768 channels, 32,768 tokens, untied head.

    Heads of 128 channels, normalized queries and keys, and 2**19 tokens per step are nanochat's.
    """
    model = _llama(
        vocab_size=32_768,
        num_layers=12,
        embed_dim=768,
        mlp_dim=2048,
        head_dim=128,
        qk_norm=True,
    )
    data = DataConfig(path="data/fineweb_edu", seq_len=2048, num_workers=4)
    return _accelerated(name, model, data, batch_size=256, accumulate=8, peak=6e-4)


def smollm(name: str) -> Config:
    """Returns a run of SmolLM-360M: 32 layers x 960 channels; the sizes are the model card's."""
    model = _llama(
        vocab_size=49_152,
        num_layers=32,
        embed_dim=960,
        mlp_dim=2560,
        num_kv_heads=5,
        tie_head=True,
    )
    data = DataConfig(path="data/smollm_corpus", seq_len=2048, num_workers=4)
    return _accelerated(name, model, data, batch_size=512, accumulate=16, peak=3e-3)


def llama_1b(name: str) -> Config:
    """Returns a run of the 1.1B model of arXiv:2405.15319, with its batch and learning rate."""
    shape = PAPER["1b"]
    assert shape.rates is not None, "PAPER has rates"
    return _accelerated(
        name, shape.model(), DATA, batch_size=1024, accumulate=16, peak=shape.rates.target
    )


def _llama(
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    mlp_dim: int,
    head_dim: int = HEAD_DIM,
    num_kv_heads: int | None = None,
    tie_head: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    num_heads = embed_dim // head_dim
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim,
        tie_head=tie_head,
        qk_norm=qk_norm,
    )


def _accelerated(
    name: str,
    model: ModelConfig,
    data: DataConfig,
    *,
    batch_size: int,
    accumulate: int,
    peak: float,
) -> Config:
    """Returns a run for accelerators; adapt `accumulate` to your devices."""
    step_tokens = batch_size * data.seq_len
    return Config(
        model=model,
        data=data,
        optimizer=AdamW(peak_learning_rate=peak),
        stages=(Stage(tokens=step_tokens, batch_size=batch_size, accumulate=accumulate),),
        evaluation=EvaluationConfig(
            every_tokens=200 * step_tokens, num_sequences=1024, batch_size=128
        ),
        checkpoints=CheckpointConfig(every_tokens=500 * step_tokens),
        logging=LoggingConfig(every_tokens=10 * step_tokens),
        platform="accelerator",
        workdir=f"runs/recipes/{name}",
    )
