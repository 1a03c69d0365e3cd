"""Architectures by parameter count, and the recipe in arXiv:2405.15319."""

import dataclasses
import math
from typing import Any

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
from stackjax.model.flops import num_params
from stackjax.optimizers import AdamW
from stackjax.runtime.errors import UserError

SEQ_LEN = 2048
BATCH_SIZE = 1024
WARMUP_STEPS = 3000
"""The paper's sequence length, batch size and warm-up in every stage."""
DATA = DataConfig(path="data/slimpajama", seq_len=SEQ_LEN, num_workers=4)
"""SlimPajama-627B with LLaMA's tokenizer; see docs/data.md."""
_MIN_STEPS = 200
"""Smaller batches keep every stage at least this long."""
_MICROBATCH = 32
"""Most sequences in a microbatch; our choice."""
_MULTIPLE = 128
_HEADS_MULTIPLE = 4


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak learning rates for both stages."""

    small: float
    """Small model. The paper's code gives the rate at 1.1B; other sizes are our choice."""
    target: float
    """Target model (arXiv:2405.15319, Table 1)."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A published architecture."""

    name: str
    params: float
    """Nominal size. The paper's models have other exact sizes."""
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    rates: Rates | None = None

    def model(self, **sizes: int) -> ModelConfig:
        """Returns the model, with some sizes replaced; the head size is kept."""
        fields: dict[str, Any] = {
            "num_layers": self.num_layers,
            "embed_dim": self.embed_dim,
            "mlp_dim": self.mlp_dim,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.embed_dim // self.num_heads,
        }
        fields.update(sizes)
        return ModelConfig(vocab_size=32_000, remat="dots", **fields)


PAPER = {
    "410m": Shape(
        "410M of arXiv:2405.15319", 0.41e9, 24, 1024, 2816, 16, 16, Rates(1e-3, 6e-4)
    ),
    "1b": Shape("1.1B of arXiv:2405.15319", 1.1e9, 24, 2048, 5632, 32, 32, Rates(1e-3, 3e-4)),
    "3b": Shape("3B of arXiv:2405.15319", 3e9, 32, 2560, 7040, 20, 4, Rates(5e-4, 1.6e-4)),
    "7b": Shape("7B of arXiv:2405.15319", 7e9, 32, 4096, 11008, 32, 8, Rates(3e-4, 1e-4)),
}
SHAPES = (
    *PAPER.values(),
    Shape("LLaMA3-8B", 8e9, 32, 4096, 14336, 32, 8),
    Shape("LLaMA2-13B", 13e9, 40, 5120, 13824, 40, 40),
    Shape("LLaMA2-70B", 70e9, 80, 8192, 28672, 64, 8),
)
"""All with LLaMA2's vocabulary, as in the paper."""


def choose_model(params: float) -> tuple[ModelConfig, str]:
    """Returns a model with about `params` parameters, and the architecture's name.

    If `params` is a shape's nominal size, the model has this shape. Otherwise the nearest
    shape gives depth and head size. Each head count divisible by 4 has a SwiGLU size divisible
    by 128 with the closest number of parameters. Among these models, the SwiGLU-to-embedding
    ratio decides.

    Raises:
      UserError: `params` is too small for this depth.
    """
    shape = _nearest(params, SHAPES)
    if math.isclose(params, shape.params, rel_tol=0.01):
        return shape.model(), shape.name
    widths = [
        model
        for heads in range(_HEADS_MULTIPLE, 513, _HEADS_MULTIPLE)
        if (model := _of_width(shape, heads, params)) is not None
    ]
    if not widths:
        raise UserError(
            f"--params is {params:.3g}, too small for a model with {shape.num_layers} layers; "
            f"use --config instead."
        )
    ratio = shape.mlp_dim / shape.embed_dim
    model = min(widths, key=lambda model: abs(model.mlp_dim / model.embed_dim - ratio))
    return model, f"{shape.name}, resized"


def _nearest(params: float, shapes: tuple[Shape, ...]) -> Shape:
    return min(shapes, key=lambda shape: abs(math.log(params / shape.params)))


def _of_width(shape: Shape, num_heads: int, params: float) -> ModelConfig | None:
    """Returns the model for a head count; None if no parameters remain for the SwiGLU."""
    is_grouped = shape.num_kv_heads < shape.num_heads
    sizes = {
        "embed_dim": num_heads * shape.embed_dim // shape.num_heads,
        "head_dim": shape.embed_dim // shape.num_heads,
        "num_heads": num_heads,
        "num_kv_heads": math.gcd(num_heads, shape.num_kv_heads) if is_grouped else num_heads,
    }
    smallest, next_size = (shape.model(mlp_dim=i * _MULTIPLE, **sizes) for i in (1, 2))
    base, per_unit = num_params(smallest), num_params(next_size) - num_params(smallest)
    mlp_dim = _MULTIPLE * (1 + round((params - base) / per_unit))
    return shape.model(mlp_dim=mlp_dim, **sizes) if mlp_dim > 0 else None


def nearest_rates(params: float) -> tuple[Rates, str]:
    """Returns the learning rates and the name for the paper's nearest size."""
    shape = _nearest(params, tuple(PAPER.values()))
    assert shape.rates is not None, "PAPER has rates"
    return shape.rates, shape.name


def paper_run(
    model: ModelConfig,
    rates: Rates,
    *,
    factor: int,
    small_tokens: float,
    tokens: float,
    shards: int,
) -> Config:
    """Returns a two-stage run with the paper's recipe, adapted to few tokens.

    Few tokens mean smaller batches and shorter warm-ups. Both cosine schedules end with the
    target's stage, so the small model grows before its learning rate has decayed.

    Args:
      tokens: At least the target's tokens.
      shards: Devices per batch.
    """
    shorter = min(small_tokens, tokens - small_tokens)
    batch_size = _batch_size(shorter)
    step_tokens = batch_size * SEQ_LEN
    accumulate = math.gcd(max(1, batch_size // _MICROBATCH), max(1, batch_size // shards))

    def schedule(length: float) -> Schedule:
        warmup = min(WARMUP_STEPS * step_tokens, int(0.1 * length))
        return Schedule(warmup_tokens=warmup)

    small = Stage(
        tokens=math.ceil(small_tokens),
        batch_size=batch_size,
        accumulate=accumulate,
        peak_learning_rate=rates.small,
        schedule=dataclasses.replace(schedule(small_tokens), horizon_tokens=math.ceil(tokens)),
    )
    target = Stage(
        tokens=math.ceil(tokens),
        batch_size=batch_size,
        accumulate=accumulate,
        growth=Stack(factor),
    )
    return Config(
        model=model,
        data=DATA,
        optimizer=AdamW(
            peak_learning_rate=rates.target, schedule=schedule(tokens - small_tokens)
        ),
        stages=(small, target),
        evaluation=EvaluationConfig(
            every_tokens=_rounded(tokens / 100),
            num_sequences=1024,
            batch_size=min(batch_size, max(256, shards)),
        ),
        checkpoints=CheckpointConfig(every_tokens=_rounded(tokens / 50)),
        logging=LoggingConfig(every_tokens=10 * step_tokens),
        platform="accelerator",
        workdir="runs/plan",
    )


def _batch_size(tokens: float) -> int:
    """Returns the paper's batch size, or the largest power of two with enough steps."""
    most = max(1, int(tokens / (SEQ_LEN * _MIN_STEPS)))
    return min(BATCH_SIZE, 2 ** (most.bit_length() - 1))


def _rounded(tokens: float) -> int:
    """Returns the tokens, rounded to a single digit."""
    return max(1, int(float(f"{tokens:.0e}")))
