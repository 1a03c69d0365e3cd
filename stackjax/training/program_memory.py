"""Memory of a compiled program on each device."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramMemory:
    """Bytes on each device while a program runs."""

    arguments: int
    temporaries: int
    total: int
    """Arguments, temporaries and outputs that do not overwrite arguments."""
    peak: int
    """The most memory in use at one time."""


def program_memory(program: jax.stages.Compiled, platform: str) -> ProgramMemory:
    """Returns a compiled program's memory, as the compiler states.

    Args:
      platform: "cpu", "gpu" or "tpu". Only the TPU compiler states the peak of all buffers;
        for others it is the sum of arguments, temporaries and outputs.
    """
    memory: Any = program.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + temporaries + outputs
    peak = memory.peak_memory_in_bytes if platform == "tpu" else total
    return ProgramMemory(arguments=arguments, temporaries=temporaries, total=total, peak=peak)
