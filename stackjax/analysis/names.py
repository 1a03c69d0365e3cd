"""Loss and cost names."""

from stackjax.options import LossName

LOSSES: dict[LossName, str] = {"held_out": "held-out loss", "train": "training loss"}
COSTS = {
    "flops_6nd": "FLOPs (6ND)",
    "flops": "FLOPs of matrix products",
    "tokens": "tokens",
    "device_seconds": "device-seconds",
}
"""Cost labels. Every cost counts all stages, and the initial model's training."""
