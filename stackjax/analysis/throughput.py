"""How fast the models of a plan train: as it was measured, or by FLOPs per token."""

import dataclasses
import math
from pathlib import Path

from stackjax.files.json_file import Fields, decode, read_object
from stackjax.model import ModelConfig
from stackjax.model.flops import matmul_flops, num_params
from stackjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of each device."""

    target: float
    small: float
    small_is_estimate: bool
    """Whether the target alone was measured, and the small model follows by FLOPs a token."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What `python -m scripts.benchmark` measured of train steps."""

    path: Path
    num_devices: int
    rates: dict[tuple[int, int, int], float]
    """Tokens per second of each device, by parameters, layers and length of sequences."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement in a benchmark."""

    section: str
    phase: str
    case: str
    values: dict
    """Numbers by name, or the reason for their absence."""


def read_benchmark(path: Path) -> Benchmark:
    """Returns the speeds in a benchmark; UserError if the file has none."""
    if not path.is_file():
        raise UserError(f"--benchmark is {path}; there is no such file.")
    return read_object(path, "name a benchmark.json", lambda fields: _benchmark(path, fields))


def read_rows(fields: Fields) -> tuple[Row, ...]:
    """Returns the measurements in a benchmark; UserError if the fields are not of one."""
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
    """Returns the measured speed of both models; UserError if there is none of the target."""
    keys = [(num_params(each), each.num_layers, seq_len) for each in (target, small)]
    rate, small_rate = map(benchmark.rates.get, keys)
    if rate is None:
        raise UserError(
            f"--benchmark is {benchmark.path}, in which no steps of the target were timed: "
            f"{_words(*keys[0])}. It has {'; '.join(_words(*k) for k in benchmark.rates)}. "
            f"Run `python -m scripts.benchmark` on this model, or give --tokens-per-second."
        )
    if small_rate is None:
        return estimated_speed(rate, target, small, seq_len)
    return Speed(target=rate, small=small_rate, small_is_estimate=False)


def estimated_speed(
    rate: float, target: ModelConfig, small: ModelConfig, seq_len: int
) -> Speed:
    """Returns the speed of both models where the small one does as many FLOPs a second.

    Args:
      rate: Tokens per second of each device that trains the target.
    """
    ratio = matmul_flops(target, seq_len) / matmul_flops(small, seq_len)
    return Speed(target=rate, small=ratio * rate, small_is_estimate=True)


def _words(params: int, num_layers: int, seq_len: int) -> str:
    return f"{params:,} parameters in {num_layers} layers, sequences of {seq_len}"
