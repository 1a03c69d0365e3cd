"""Programs of a run, by phase: train step, growth and evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import jax

from stackjax.config import Config
from stackjax.run.validation import batch_sums
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import (
    abstract_batch,
    abstract_state,
    compile_step,
    growth_key,
    jit_growth,
    partial_donation,
)
from stackjax.training.phase import Phase

ProgramKind = Literal["step", "evaluation", "growth"]
Devices = Sequence[jax.Device]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program of a phase."""

    phase: Phase
    kind: ProgramKind
    key: Hashable
    """Equal for equal programs."""
    compile: Callable[[Devices], jax.stages.Compiled]

    @property
    def name(self) -> str:
        """The stage and the kind; a fit is named as such."""
        kind = "fit step" if self.kind == "step" and self.phase.fit else self.kind
        batch = f", batch {self.phase.batch_size}" if self.phase.part else ""
        return f"stage {self.phase.stage} {kind}{batch}"


def programs(config: Config, phases: Sequence[Phase]) -> list[Program]:
    """Returns the phases' programs, in order; the first of several equal programs."""
    found: dict[Hashable, Program] = {}
    for source, phase in zip((None, *phases), phases, strict=False):
        for program in _phase_programs(config, source, phase):
            found.setdefault(program.key, program)
    return list(found.values())


def _phase_programs(config: Config, source: Phase | None, phase: Phase) -> list[Program]:
    if source is None or phase.part:
        growth = []
    else:
        growth = [growth_program(config, source, phase)]
    step = step_program(config, phase)
    # The evaluation of a fit has the grown model, as the stage after it.
    return [*growth, step, evaluation_program(config, phase)]


def step_program(config: Config, phase: Phase) -> Program:
    """Returns a phase's train step."""
    return Program(
        phase=phase,
        kind="step",
        key=("step", phase.program),
        compile=functools.partial(compile_step, config, phase),
    )


def evaluation_program(config: Config, phase: Phase) -> Program:
    """Returns the evaluation of a phase's model on a validation batch."""
    return Program(
        phase=phase,
        kind="evaluation",
        key=("evaluation", phase.model, phase.mesh, phase.seq_len),
        compile=functools.partial(_compile_evaluation, config, phase),
    )


def growth_program(config: Config, source: Phase, phase: Phase) -> Program:
    """Returns the growth from a phase's last state to the next phase's first state."""
    return Program(
        phase=phase,
        kind="growth",
        key=("growth", phase.index),
        compile=functools.partial(_compile_growth, config, source, phase),
    )


def _compile_evaluation(config: Config, phase: Phase, devices: Devices) -> jax.stages.Compiled:
    mesh = build_mesh(phase.mesh, devices)
    rows = dataclasses.replace(phase, batch_size=config.evaluation.batch_size, accumulate=1)
    model_phase = dataclasses.replace(phase, fit=None, reparameterizations=())
    with jax.set_mesh(mesh):
        params = on_mesh(abstract_state(model_phase).params, mesh)
        batch = abstract_batch(config, rows, mesh)
        return batch_sums.lower(phase.model, params, batch).compile()


def _compile_growth(
    config: Config, source: Phase, phase: Phase, devices: Devices
) -> jax.stages.Compiled:
    mesh = build_mesh(phase.mesh, devices)
    with jax.set_mesh(mesh), partial_donation():
        state = on_mesh(abstract_state(source), mesh)
        if phase.optimizer_state == "reset":
            state = dataclasses.replace(state, opt_state=None)
        key = on_mesh(jax.eval_shape(lambda: growth_key(config, phase)), mesh)
        return jit_growth(source, phase, donate=True).lower(state, key).compile()
