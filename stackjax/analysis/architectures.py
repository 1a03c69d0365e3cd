"""Architectures by their number of parameters, and the run that the paper would give them."""

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
"""Tokens in a sequence, as in arXiv:2405.15319."""
_BATCH_SIZE = 1024
_WARMUP_STEPS = 3000
_LEAST_STEPS = 200
"""Steps that a stage has at least, by a smaller batch where tokens are few."""
_MICROBATCH = 32
"""Sequences that a microbatch has at most; ours."""
_MULTIPLE = 128
_HEADS_MULTIPLE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A published architecture."""

    name: str
    params: float
    """What it is called by; those of arXiv:2405.15319 have other numbers of them."""
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int

    def model(self, **fields: int) -> ModelConfig:
        """Returns the model, some of whose sizes may be others; heads keep their size."""
        sizes: dict[str, Any] = {
            "num_layers": self.num_layers,
            "embed_dim": self.embed_dim,
            "mlp_dim": self.mlp_dim,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.embed_dim // self.num_heads,
        }
        sizes.update(fields)
        return ModelConfig(vocab_size=32_000, remat="dots", **sizes)


def _shape(name: str, params: float, *sizes: int) -> Shape:
    fields = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads")
    return Shape(name=name, params=params, **dict(zip(fields, sizes, strict=True)))


SHAPES = (
    _shape("410M of arXiv:2405.15319", 0.41e9, 24, 1024, 2816, 16, 16),
    _shape("1.1B of arXiv:2405.15319", 1.1e9, 24, 2048, 5632, 32, 32),
    _shape("3B of arXiv:2405.15319", 3e9, 32, 2560, 7040, 20, 4),
    _shape("7B of arXiv:2405.15319", 7e9, 32, 4096, 11008, 32, 8),
    _shape("LLaMA3-8B", 8e9, 32, 4096, 14336, 32, 8),
    _shape("LLaMA2-13B", 13e9, 40, 5120, 13824, 40, 40),
    _shape("LLaMA2-70B", 70e9, 80, 8192, 28672, 64, 8),
)
"""All of them with the vocabulary of LLaMA2, which is that of arXiv:2405.15319."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rates of one of the paper's sizes."""

    name: str
    params: float
    small: float
    """Of the small model; the paper's code has it at 1.1B alone, the others are ours."""
    target: float
    """By Table 1 of arXiv:2405.15319."""


RATES = (
    Rates(name="410M", params=0.41e9, small=1e-3, target=6e-4),
    Rates(name="1.1B", params=1.1e9, small=1e-3, target=3e-4),
    Rates(name="3B", params=3e9, small=5e-4, target=1.6e-4),
    Rates(name="7B", params=7e9, small=3e-4, target=1e-4),
)


def choose_model(params: float) -> tuple[ModelConfig, str]:
    """Returns a model of that many parameters, and which architecture it is.

    One of `SHAPES` where a number is that of its name. Otherwise the nearest one, as deep,
    with heads and kv heads of the same size: for each number of heads that 4 divides there is
    a SwiGLU, in multiples of 128 units, with which the number comes out best; the one whose
    units per channel are closest to those of the shape is taken.

    Raises:
      UserError: There is no model as small as that.
    """
    shape = min(SHAPES, key=lambda shape: abs(math.log(params / shape.params)))
    if math.isclose(params, shape.params, rel_tol=0.01):
        return shape.model(), shape.name
    widths = [
        model
        for heads in range(_HEADS_MULTIPLE, 513, _HEADS_MULTIPLE)
        if (model := _of_width(shape, heads, params)) is not None
    ]
    if not widths:
        raise UserError(
            f"--params is {params:.3g}, for which embedding, head and attention of "
            f"{shape.num_layers} layers are too large already; name a --config instead."
        )
    ratio = shape.mlp_dim / shape.embed_dim
    model = min(widths, key=lambda model: abs(model.mlp_dim / model.embed_dim - ratio))
    return model, f"{shape.name}, made to fit"


def _of_width(shape: Shape, num_heads: int, params: float) -> ModelConfig | None:
    """Returns the model with so many heads and parameters; None if it has no SwiGLU left."""
    head_dim = shape.embed_dim // shape.num_heads
    is_grouped = shape.num_kv_heads < shape.num_heads
    kv_heads = math.gcd(num_heads, shape.num_kv_heads) if is_grouped else num_heads
    sizes = {
        "embed_dim": num_heads * head_dim,
        "num_heads": num_heads,
        "num_kv_heads": kv_heads,
    }
    least, next_one = (shape.model(mlp_dim=i * _MULTIPLE, **sizes) for i in (1, 2))
    base, per_unit = num_params(least), num_params(next_one) - num_params(least)
    mlp_dim = _MULTIPLE * (1 + round((params - base) / per_unit))
    return shape.model(mlp_dim=mlp_dim, **sizes) if mlp_dim > 0 else None


def nearest_rates(params: float) -> Rates:
    """Returns the peak learning rates of the nearest size that the paper trains."""
    return min(RATES, key=lambda rates: abs(math.log(params / rates.params)))


def paper_run(
    model: ModelConfig,
    rates: Rates,
    *,
    factor: int,
    small_tokens: float,
    tokens: float,
    shards: int,
) -> Config:
    """Returns a run of two stages by the paper's recipe, where it fits.

    Batches are smaller, and warm-ups shorter, where there are few tokens. Cosines end with
    the target's stage, so that the small model grows before its rate has decayed.

    Args:
      tokens: Those of the target's stage, or somewhat more.
      shards: Over how many devices a batch is cut.
    """
    shorter = min(small_tokens, tokens - small_tokens)
    batch_size = _batch_size(shorter)
    step_tokens = batch_size * SEQ_LEN
    accumulate = math.gcd(max(1, batch_size // _MICROBATCH), max(1, batch_size // shards))

    def schedule(length: float) -> Schedule:
        warmup = min(_WARMUP_STEPS * step_tokens, int(0.1 * length))
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
        data=DataConfig(path="data/slimpajama", seq_len=SEQ_LEN, num_workers=4),
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
    """Returns the paper's batch, or the power of two that leaves a stage enough steps."""
    most = max(1, int(tokens / (SEQ_LEN * _LEAST_STEPS)))
    return min(_BATCH_SIZE, 2 ** (most.bit_length() - 1))


def _rounded(tokens: float) -> int:
    """Returns a number of tokens to one digit."""
    return max(1, int(float(f"{tokens:.0e}")))
