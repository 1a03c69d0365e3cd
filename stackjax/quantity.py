"""Numbers as people write and read them."""

import math
from typing import Annotated

import tyro

from stackjax.errors import UserError


def _parse_count(text: list[str]) -> int:
    value = float(text[0].replace("_", ""))
    if not value.is_integer():
        raise UserError(f"{text[0]} is not a whole number")
    return int(value)


Count = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=_parse_count,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A whole number that a command line may write as 2e6."""


def short(number: float) -> str:
    """Returns a count in three digits: 999, 41.2k, 2.10M, 105M, 1.05B."""
    if math.isinf(number):
        return "inf"
    rounded = float(f"{number:.2e}")  # before the suffix is chosen: 999999 is 1.00M
    power = min((len(f"{rounded:.0f}") - 1) // 3, 4)
    if power == 0:
        return f"{rounded:.0f}"
    return f"{rounded / 1000**power:#.3g}".rstrip(".") + " kMBT"[power]
