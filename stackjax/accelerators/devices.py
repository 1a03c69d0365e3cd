"""Names of devices on a command line, such as `v5p:2x2x2` or `h100:8`."""

import dataclasses
import math
import re
from pathlib import Path

from stackjax.runtime.errors import UserError

TPU_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
"""TPU versions, and the number of sizes in their topologies."""
GPUS = ("h100", "h200", "a100-40", "a100-80", "b200")
"""GPUs with a target description in `targets`."""

_TEXT = re.compile(r"(?P<name>[\w-]+):(?P<sizes>\d+(x\d+)*)(\*(?P<slices>\d+))?")
_EXAMPLES = "`v5p:2x2x2`, `v5e:16x16*2` for two slices, `h100:8`, or `h200:8x4` for 4 hosts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceGroup:
    """Devices of one kind, not necessarily present."""

    name: str
    """A key of `TPU_DIMENSIONS`, or one of `GPUS`."""
    sizes: tuple[int, ...]
    """TPUs: the topology's sizes. GPUs: devices per host, and hosts."""
    num_slices: int = 1
    """TPU slices."""
    target: Path | None = None
    """GPUs: a file with XLA's description of the GPU; None for the package's."""

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs."""
        return self.name in TPU_DIMENSIONS

    def __str__(self) -> str:
        slices = f"*{self.num_slices}" if self.num_slices > 1 else ""
        return f"{self.name}:{'x'.join(map(str, self.sizes))}{slices}"


def parse_devices(text: str, target: Path | None = None) -> DeviceGroup:
    """Returns the devices named on a command line.

    >>> parse_devices("h200:8x4").sizes
    (8, 4)

    Args:
      target: A file with XLA's description of the GPU; by default the package's.

    Raises:
      UserError: The text does not name devices, or names TPUs with a target.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise _refusal(text, f"write NAME:SIZES, such as {_EXAMPLES}")
    sizes = tuple(map(int, match["sizes"].split("x")))
    group = DeviceGroup(
        name=match["name"].lower(),
        sizes=sizes,
        num_slices=int(match["slices"] or 1),
        target=target,
    )
    _check_sizes(text, group)
    return group


def _check_sizes(text: str, group: DeviceGroup) -> None:
    """Raises UserError if a name is unknown or has other sizes."""
    if not group.is_tpu and group.name not in GPUS:
        known = ", ".join((*TPU_DIMENSIONS, *GPUS))
        raise _refusal(text, f"{group.name!r} is unknown; choose one of {known}")
    if not math.prod(group.sizes) * group.num_slices:
        raise _refusal(text, "every size must be at least 1")
    if group.is_tpu and group.target is not None:
        raise _refusal(text, "--target describes a GPU; leave it out for TPUs")
    if group.is_tpu and len(group.sizes) != TPU_DIMENSIONS[group.name]:
        example = "x".join("2" * TPU_DIMENSIONS[group.name])
        raise _refusal(
            text,
            f"a {group.name} topology has {TPU_DIMENSIONS[group.name]} sizes; write such as "
            f"`{group.name}:{example}`",
        )
    if not group.is_tpu and (len(group.sizes) > 2 or group.num_slices > 1):
        raise _refusal(
            text,
            f"GPUs are devices per host x hosts; write `{group.name}:8x4` for 4 hosts of 8",
        )


def _refusal(text: str, reason: str) -> UserError:
    return UserError(f"--devices is {text!r}; {reason}.")
