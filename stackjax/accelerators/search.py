"""The fastest choice that fits, for each stage: mesh, microbatches, remat and loss chunk."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from stackjax.accelerators.measure import Machine, Measured, measure
from stackjax.accelerators.programs import programs
from stackjax.config import Config
from stackjax.model.config import RematPolicy
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MeshConfig, MomentMemory, mesh_axes
from stackjax.sharding.mesh import default_fsdp, num_slices_of
from stackjax.training.expand import expand
from stackjax.training.preflight import Estimate, check_phase

_REMAT: tuple[RematPolicy, ...] = ("none", "dots", "lean", "full")
"""Policies, from least computation to least memory."""
_LOSS_CHUNKS = (512, 2048)
"""Positions per chunk of the loss; the first is used to choose everything else."""
_SIZES = (1, 2, 4, 8)
"""Sizes of the mesh axes `context` and `tensor`."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a stage runs. The stage learns the same, but for rounding."""

    mesh: MeshConfig
    accumulate: int
    remat: RematPolicy
    loss_chunk: int
    moment_memory: MomentMemory = "device"

    def __str__(self) -> str:
        moments = ", moments on the host" if self.moment_memory == "host" else ""
        axes = mesh_axes(self.mesh)
        sizes = " x ".join(f"{axis} {getattr(self.mesh, axis)}" for axis in axes)
        return (
            f"{sizes}, accumulate {self.accumulate}, remat {self.remat}, "
            f"loss_chunk {self.loss_chunk}{moments}"
        )


Try = Callable[[Choice], Measured]
"""Compiles a stage's train step with a choice."""


def search(config: Config, machine: Machine, show: Callable[[str], None]) -> list[Choice]:
    """Returns the choice with the shortest estimated step that fits, for each stage.

    Args:
      show: Receives a line for each compiled choice.

    Raises:
      UserError: Nothing fits a stage, or a stage has several batches.
    """
    for index, stage in enumerate(config.stages):
        if stage.batch_steps:
            raise UserError(
                f"stages.{index} has batch_steps, and the search finds one accumulate for a "
                f"stage; search with each batch size alone (--stages.{index}.batch-size)."
            )
    return [_search_stage(config, stage, machine, show) for stage in range(len(config.stages))]


def with_choices(config: Config, choices: list[Choice]) -> Config:
    """Returns a config with a choice for each stage."""
    stages = (
        dataclasses.replace(stage, **vars(choice))
        for stage, choice in zip(config.stages, choices, strict=True)
    )
    return dataclasses.replace(config, stages=tuple(stages))


def _search_stage(
    config: Config, stage: int, machine: Machine, show: Callable[[str], None]
) -> Choice:
    found: dict[Choice, float] = {}

    def attempt(choice: Choice) -> Measured:
        measured = _measure_stage(config, stage, choice, machine)
        show(f"stage {stage}: {choice}: {_result(measured)}")
        if measured.fits:
            found[choice] = _seconds(measured)
        return measured

    def fastest() -> float:
        return min(found.values(), default=math.inf)

    def search_tensor(memory: MomentMemory, context: int, tensor: int) -> None:
        for mesh in _meshes(machine, context, tensor):
            before = fastest()
            first = Choice(mesh, 1, _REMAT[0], _LOSS_CHUNKS[0], memory)
            _search_mesh(config, stage, first, machine, attempt)
            if fastest() == before:
                return

    def while_faster(sizes: list[int], search_size: Callable[[int], None]) -> None:
        for size in sizes:
            before = fastest()
            search_size(size)
            if found and fastest() == before:
                return

    def search_context(memory: MomentMemory, context: int) -> None:
        search_size = functools.partial(search_tensor, memory, context)
        while_faster(_sizes(machine, context), search_size)

    # Fewer shards, more tensor and more context parallelism: each as long as it pays.
    while_faster(_sizes(machine), functools.partial(search_context, "device"))
    if not found and not machine.group.is_tpu:
        while_faster(_sizes(machine), functools.partial(search_context, "host"))
    if not found:
        # Raises the reason if the batch or the model does not divide.
        mesh = next(_meshes(machine, context=1, tensor=1))
        _estimates(config, stage, Choice(mesh, 1, _REMAT[0], _LOSS_CHUNKS[0]), machine)
        raise UserError(
            f"stages.{stage} does not fit {machine.group} with any mesh, accumulate and remat; "
            f"use more devices, or devices with more memory."
        )
    best = min(found, key=found.__getitem__)
    for loss_chunk in _LOSS_CHUNKS[1:]:
        attempt(dataclasses.replace(best, loss_chunk=loss_chunk))
    return min(found, key=found.__getitem__)


def _search_mesh(
    config: Config, stage: int, first: Choice, machine: Machine, attempt: Try
) -> None:
    """Compiles the choices of a mesh that may be the fastest.

    More computation only pays with fewer microbatches, because each microbatch gathers all
    parameters. So each stronger policy is tried with fewer microbatches than the one before.

    Args:
      first: The choice with one microbatch and the weakest policy.
    """
    fewest: int | None = None
    for remat in _REMAT:
        accumulate = 1
        while fewest is None or accumulate < fewest:
            choice = dataclasses.replace(first, accumulate=accumulate, remat=remat)
            if not _is_possible(config, stage, choice, machine):
                break
            measured = attempt(choice)
            if measured.fits:
                fewest = accumulate
                break
            accumulate *= _smallest_factor(measured)


def _smallest_factor(measured: Measured) -> int:
    """Returns by how much to multiply the microbatches of a step that does not fit.

    Temporaries shrink at most in proportion, so no smaller power of two fits.
    """
    if measured.peak_bytes is None or measured.argument_bytes is None:
        return 2
    temporaries = measured.peak_bytes - measured.argument_bytes
    room = max(measured.usable_bytes - measured.argument_bytes, 1)
    factor = 2
    while factor * room < temporaries:
        factor *= 2
    return factor


def _sizes(machine: Machine, others: int = 1) -> list[int]:
    """Returns the possible sizes of a mesh axis within a slice, beside `others` shards."""
    per_slice = len(machine.devices) // num_slices_of(machine.devices)
    return [size for size in _SIZES if per_slice % (others * size) == 0]


def _meshes(machine: Machine, context: int, tensor: int) -> Iterator[MeshConfig]:
    """Yields meshes, the most shards first."""
    left = len(machine.devices) // (context * tensor)
    fsdp = default_fsdp(left // num_slices_of(machine.devices), context)
    while True:
        yield MeshConfig(replica=left // fsdp, fsdp=fsdp, context=context, tensor=tensor)
        if fsdp % 2:
            return
        fsdp //= 2


def _estimates(
    config: Config, stage: int, choice: Choice, machine: Machine
) -> tuple[Config, list[Estimate]]:
    """Returns the config with a choice for a stage, and the stage's phases.

    Only this stage is checked: the others may not fit the machine before their own search.
    """
    stages = list(config.stages)
    stages[stage] = dataclasses.replace(stages[stage], **vars(choice))
    changed = dataclasses.replace(config, stages=tuple(stages))
    num_devices, num_slices = len(machine.devices), num_slices_of(machine.devices)
    estimates = [
        check_phase(changed, phase, num_devices, num_slices=num_slices)
        for phase in expand(changed)
        if phase.stage == stage
    ]
    return changed, estimates


def _is_possible(config: Config, stage: int, choice: Choice, machine: Machine) -> bool:
    """Returns whether a choice divides batch and model, and its state fits."""
    try:
        _, estimates = _estimates(config, stage, choice, machine)
    except UserError:
        return False
    return all(each.state_bytes + each.gradient_bytes <= machine.memory for each in estimates)


def _measure_stage(config: Config, stage: int, choice: Choice, machine: Machine) -> Measured:
    """Returns a stage's train step; for a learned growth, the fit's step if it does not fit."""
    changed, estimates = _estimates(config, stage, choice, machine)
    steps = [
        program
        for program in programs(changed, [each.phase for each in estimates])
        if program.kind == "step"
    ]
    for program in steps:
        measured = measure(changed, program, machine)
        if not measured.fits:
            return measured
    return measured


def _seconds(measured: Measured) -> float:
    assert measured.bounds is not None, "a program that fits has bounds"
    return measured.bounds.estimate


def _result(measured: Measured) -> str:
    if measured.peak_bytes is None:
        return "does not fit"
    size = f"{measured.peak_bytes / 2**30:.2f} GiB"
    if not measured.fits or measured.mfu is None:
        return f"does not fit, {size}"
    return f"{size}, {_seconds(measured):.2f} s, MFU {measured.mfu:.0%}"
