"""Training speed for a plan's models, measured or estimated from FLOPs per token."""

import dataclasses
import math
from pathlib import Path

from stackjax.files.json_file import Fields, decode, read_object
from stackjax.model import ModelConfig
from stackjax.model.flops import matmul_flops, num_params
from stackjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second per device."""

    target: float
    small: float
    small_is_estimate: bool
    """Is the small model's speed an estimate from FLOPs per token?"""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Train-step speeds measured by `python -m scripts.benchmark`."""

    path: Path
    num_devices: int
    rates: dict[tuple[int, int, int], float]
    """Tokens per second per device, by (parameters, layers, sequence length)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement in a benchmark file."""

    section: str
    phase: str
    case: str
    values: dict
    """Numbers by name, or the reason for their absence."""


def read_benchmark(path: Path) -> Benchmark:
    """Returns the speeds in a benchmark file; UserError if the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"--benchmark is {path}; there is no such file.")
    return read_object(path, "name a benchmark.json", lambda fields: _benchmark(path, fields))


def read_rows(fields: Fields) -> tuple[Row, ...]:
    """Returns the measurements in a benchmark file; UserError if fields are wrong."""
    return decode(tuple[Row, ...], fields.get("rows"), "rows")


def _benchmark(path: Path, fields: Fields) -> Benchmark:
    num_devices = decode(int, fields.get("num_devices"), "num_devices")
    if num_devices < 1:
        raise UserError(f"num_devices is {num_devices}")
    values = {(row.section, row.phase): row.values for row in read_rows(fields)}
    rates = {}
    for (section, phase), step in values.items():
        if section == "step" and "tokens_per_second" in step:
            sizes = values.get(("model", phase), {})
            params, layers, seq_len = (
                decode(int, sizes.get(name), f"{name} of the model of {phase}")
                for name in ("params", "num_layers", "seq_len")
            )
            rate = decode(float, step["tokens_per_second"], "tokens_per_second")
            if not 0 < rate < math.inf:
                raise UserError(f"tokens_per_second is {rate}")
            rates[params, layers, seq_len] = rate / num_devices
    return Benchmark(path, num_devices, rates)


def measured_speed(
    benchmark: Benchmark, target: ModelConfig, small: ModelConfig, seq_len: int
) -> Speed:
    """Returns both models' measured speed; UserError if the target's is missing."""
    keys = [(num_params(each), each.num_layers, seq_len) for each in (target, small)]
    rate, small_rate = map(benchmark.rates.get, keys)
    if rate is None:
        raise UserError(
            f"--benchmark is {benchmark.path}, without the target: {_words(*keys[0])}. It has "
            f"{'; '.join(_words(*k) for k in benchmark.rates)}. Run `python -m "
            f"scripts.benchmark` on this model, or give --tokens-per-second."
        )
    if small_rate is None:
        return estimated_speed(rate, target, small, seq_len)
    return Speed(target=rate, small=small_rate, small_is_estimate=False)


def estimated_speed(
    rate: float, target: ModelConfig, small: ModelConfig, seq_len: int
) -> Speed:
    """Returns both models' speed, assuming equal FLOPs per second.

    Args:
      rate: The target's tokens per second per device.
    """
    ratio = matmul_flops(target, seq_len) / matmul_flops(small, seq_len)
    return Speed(target=rate, small=ratio * rate, small_is_estimate=True)


def _words(params: int, num_layers: int, seq_len: int) -> str:
    return f"{params:,} parameters, {num_layers} layers, sequences of {seq_len}"
