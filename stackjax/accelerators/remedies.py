"""The smallest change to a config with which a program fits."""

import dataclasses
from collections.abc import Iterator

import jax

from stackjax.accelerators.measure import Machine, measure
from stackjax.accelerators.programs import Devices, Program, evaluation_program, step_program
from stackjax.config import Config
from stackjax.model.config import RematPolicy
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import num_shards
from stackjax.sharding.platform import platform_of
from stackjax.training.phase import Phase

_STRONGER: dict[RematPolicy, tuple[RematPolicy, ...]] = {
    "none": ("dots", "lean", "full"),
    "dots": ("lean", "full"),
    "lean": ("full",),
    "full": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A change to a config, and the program with this change."""

    change: str
    """The options that make the change."""
    config: Config
    program: Program


def way_out(config: Config, program: Program, machine: Machine) -> str:
    """Returns the smallest change with which a program fits, found by compiling."""
    for candidate in candidates(config, program, machine.devices):
        measured = measure(candidate.config, candidate.program, machine)
        if measured.fits:
            assert measured.peak_bytes is not None, "a program that fits has a peak"
            return f"{candidate.change} fits, with {measured.peak_bytes / 2**30:.2f} GiB"
    return "nothing smaller fits; use more devices or a larger mesh.fsdp"


def candidates(config: Config, program: Program, devices: Devices) -> Iterator[Candidate]:
    """Yields changes that need less memory, the smallest first."""
    if program.kind == "step":
        yield from _step_candidates(config, program.phase, devices)
    elif program.kind == "evaluation":
        yield from _evaluation_candidates(config, program.phase, devices)


def _step_candidates(config: Config, phase: Phase, devices: Devices) -> Iterator[Candidate]:
    """Yields more microbatches, then stronger remat, then moments in the host's memory."""
    shards = _batch_shards(phase, devices)
    smaller = phase
    while phase.batch_size % (2 * smaller.accumulate * shards) == 0:
        smaller = dataclasses.replace(smaller, accumulate=2 * smaller.accumulate)
        yield Candidate(
            change=f"--{_option(phase)} {smaller.accumulate}",
            config=config,
            program=step_program(config, smaller),
        )
    ways = [(remat, phase.moment_memory) for remat in _STRONGER[phase.model.remat]]
    if phase.moment_memory == "device" and platform_of(devices[0]) == "gpu":
        ways.append(("full", "host"))
    for remat, memory in ways:
        model = dataclasses.replace(phase.model, remat=remat)
        changed = dataclasses.replace(smaller, model=model, moment_memory=memory)
        moved = memory != phase.moment_memory
        yield Candidate(
            change=f"--{_option(phase)} {smaller.accumulate} "
            f"--stages.{phase.stage}.remat {remat}"
            + (f" --stages.{phase.stage}.moment-memory {memory}" if moved else ""),
            config=config,
            program=step_program(config, changed),
        )


def _evaluation_candidates(
    config: Config, phase: Phase, devices: Devices
) -> Iterator[Candidate]:
    """Yields smaller evaluation batches."""
    rows, shards = config.evaluation.batch_size, _batch_shards(phase, devices)
    while rows % (2 * shards) == 0:
        rows //= 2
        evaluation = dataclasses.replace(config.evaluation, batch_size=rows)
        changed = dataclasses.replace(config, evaluation=evaluation)
        yield Candidate(
            change=f"--evaluation.batch-size {rows}",
            config=changed,
            program=evaluation_program(changed, phase),
        )


def _batch_shards(phase: Phase, devices: Devices) -> int:
    with jax.set_mesh(build_mesh(phase.mesh, devices)):
        return num_shards("batch")


def _option(phase: Phase) -> str:
    """Returns the command-line option for the microbatches of a phase."""
    return f"{phase.batch_field}.accumulate".replace("_", "-")
