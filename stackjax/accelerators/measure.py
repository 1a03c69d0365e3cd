"""A program compiled for described devices: memory, costs and bounds."""

import dataclasses
import time
from collections.abc import Sequence

import jax

from stackjax.accelerators.bounds import Bounds, time_bounds
from stackjax.accelerators.costs import Costs, program_costs
from stackjax.accelerators.devices import DeviceGroup
from stackjax.accelerators.hlo import parse_module
from stackjax.accelerators.programs import Program
from stackjax.accelerators.speeds import speeds_of
from stackjax.accelerators.topology import devices_per_host
from stackjax.config import Config
from stackjax.model.attention import choose_kernel
from stackjax.model.config import ModelConfig
from stackjax.model.module import compute_dtype
from stackjax.runtime.errors import is_out_of_memory
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.platform import platform_of
from stackjax.training.program_memory import program_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices to compile for."""

    group: DeviceGroup
    devices: Sequence[jax.Device]
    memory: int
    """Usable bytes on each device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A compiled program. Bytes, FLOPs and seconds are of one device."""

    name: str
    compute_dtype: str
    attention: str
    """Attention kernel; empty for programs without attention."""
    attention_reason: str
    compile_seconds: float
    usable_bytes: int
    argument_bytes: int | None = None
    """None if the compiler refused the program."""
    peak_bytes: int | None = None
    refusal: str = ""
    """The compiler's message for a program that does not fit."""
    model_flops: float | None = None
    """Our own count of a train step's FLOPs; None for other programs."""
    costs: Costs | None = None
    bounds: Bounds | None = None
    mfu: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the program fits the devices."""
        return self.peak_bytes is not None and self.peak_bytes <= self.usable_bytes


def measure(config: Config, program: Program, machine: Machine) -> Measured:
    """Returns a program's memory, costs and bounds."""
    start = time.monotonic()
    try:
        compiled, refusal = program.compile(machine.devices), ""
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        compiled, refusal = None, str(error).splitlines()[0]
    seconds = time.monotonic() - start
    measured = _describe(config, program, machine, seconds, refusal)
    if compiled is None:
        return measured
    return _with_costs(measured, program, machine, compiled)


def _describe(
    config: Config, program: Program, machine: Machine, seconds: float, refusal: str
) -> Measured:
    model, seq_len = program.phase.model, program.phase.seq_len
    with jax.set_mesh(build_mesh(program.phase.mesh, machine.devices)):
        dtype = compute_dtype(model)
        kernel = choose_kernel(model, dtype, seq_len)
    is_growth = program.kind == "growth"
    return Measured(
        name=program.name,
        compute_dtype="" if is_growth else dtype.name,
        attention="" if is_growth else kernel,
        attention_reason="" if is_growth else _reason(model, kernel, dtype.name, seq_len),
        compile_seconds=seconds,
        usable_bytes=machine.memory,
        refusal=refusal,
    )


def _reason(model: ModelConfig, kernel: str, dtype: str, seq_len: int) -> str:
    """Returns why a kernel is used."""
    if model.attention != "auto":
        return f"model.attention is {model.attention!r}"
    case = f"{dtype}, head_dim {model.head_dim}, {seq_len} tokens"
    if kernel == "xla":
        return f"no faster kernel supports {case}"
    return f"the fastest kernel for {case}"


def _with_costs(
    measured: Measured, program: Program, machine: Machine, compiled: jax.stages.Compiled
) -> Measured:
    num_devices = len(machine.devices)
    hosts = devices_per_host(machine.group, num_devices)
    text = compiled.as_text()
    assert text is not None, "described devices have one program"
    costs = program_costs(parse_module(text), num_devices, hosts)
    speeds = speeds_of(machine.group, machine.devices[0], program.phase.model.head_dim)
    bounds, flops = time_bounds(costs, speeds), None
    if program.kind == "step":
        flops = program.phase.per_step.flops / num_devices
    memory = program_memory(compiled, platform_of(machine.devices[0]))
    return dataclasses.replace(
        measured,
        argument_bytes=memory.arguments,
        peak_bytes=memory.peak,
        model_flops=flops,
        costs=costs,
        bounds=bounds,
        mfu=None if flops is None else flops / (bounds.estimate * speeds.peak),
    )
