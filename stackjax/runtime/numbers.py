"""Types for numbers in configs, with their ranges, and short formatting of counts."""

import math
from typing import Annotated

from stackjax.runtime.ranges import Length, Real, Whole

Count = Annotated[int, Whole(at_least=0, at_most=10**18)]
"""A count, possibly 0; the command line also takes 2e6."""
Tokens = Annotated[int, Whole(at_least=1, at_most=10**18)]
"""The length of a run or interval in tokens."""
Size = Annotated[int, Whole(at_least=1, at_most=2**20)]
"""A count of items in memory, such as a batch size."""
Seed = Annotated[int, Whole(at_least=0, at_most=2**32 - 1)]
"""A seed for a JAX key; JAX reads 32 bits."""
Positive = Annotated[float, Real(more_than=0)]
NonNegative = Annotated[float, Real(at_least=0)]
Rate = Annotated[float, Real(more_than=0, at_most=10)]
"""A learning rate. An Adam step changes each parameter by about this much."""
Epsilon = Annotated[float, Real(more_than=0, at_most=1)]
"""A small number that avoids division by zero."""
Share = Annotated[float, Real(at_least=0, at_most=1)]
"""A fraction from 0 to 1."""
Decay = Annotated[float, Real(at_least=0, less_than=1)]
"""The decay rate of a moving average."""
Text = Annotated[str, Length(at_most=4096)]
"""A name or path, not empty."""


def short(number: float) -> str:
    """Returns a count with three digits: 0.662, 22.9, 999, 41.2k, 2.10M, 105M, 1.05B."""
    if math.isinf(number):
        return "inf"
    rounded = float(f"{number:.2e}")  # Round before choosing the suffix: 999999 is 1.00M.
    power = min((len(f"{rounded:.0f}") - 1) // 3, 4)
    if power == 0:
        return f"{rounded:.3g}"
    return f"{rounded / 1000**power:#.3g}".rstrip(".") + " kMBT"[power]
