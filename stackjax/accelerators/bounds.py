"""Lower bounds and an estimate of a program's time, from its costs and assumed speeds."""

import dataclasses

from stackjax.accelerators.costs import Collective, Costs
from stackjax.accelerators.speeds import (
    EXPOSED,
    GPU_PRODUCTS,
    MEMORY_EFFICIENCY,
    TPU_PRODUCTS,
    Speeds,
)

FORMULA = f"""\
The estimate adds the times of matrix products, at {TPU_PRODUCTS:.0%} of a TPU's peak or
{GPU_PRODUCTS:.0%} of a GPU's; of attention kernels, at 20 to 70% of the peak by device and
head_dim, over the causal half of the scores (all scores with an explicit mask); of the memory
traffic of elementwise operations, at {MEMORY_EFFICIENCY:.0%} of the bandwidth; of
collectives, all of synchronous ones and {EXPOSED:.0%} of asynchronous ones; and of copies to
and from the host's memory. MFU is our FLOPs (full attention squares, no rematerialization) /
(estimate x peak). These speeds are assumptions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Seconds that a program takes at least, and an estimate."""

    flops: float
    """Matrix products and attention at the peak."""
    memory: float
    """Memory traffic at the full bandwidth."""
    wire: float
    """Communication at the full rate."""
    estimate: float
    """Seconds by `FORMULA`."""


def time_bounds(costs: Costs, speeds: Speeds) -> Bounds:
    """Returns the bounds and the estimate of a program's time."""
    attention = costs.computed_attention_flops
    wire = {
        is_synchronous: sum(
            _wire_seconds(each, speeds)
            for each in costs.collectives
            if each.is_synchronous == is_synchronous
        )
        for is_synchronous in (True, False)
    }
    return Bounds(
        flops=(costs.dot_flops + attention) / speeds.peak,
        memory=costs.traffic / speeds.memory,
        wire=wire[True] + wire[False],
        estimate=costs.dot_flops / (speeds.products * speeds.peak)
        + attention / (speeds.attention * speeds.peak)
        + costs.elementwise_traffic / (MEMORY_EFFICIENCY * speeds.memory)
        + wire[True]
        + EXPOSED * wire[False]
        + costs.host_bytes / speeds.host,
    )


def _wire_seconds(collective: Collective, speeds: Speeds) -> float:
    """Returns the time of all calls; collectives over several hosts use the network."""
    network = speeds.wire if speeds.network is None else speeds.network
    return collective.wire_bytes / (network if collective.crosses_hosts else speeds.wire)
