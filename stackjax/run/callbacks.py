"""What looks at a model while it trains, where the config asks for it: held-out loss, layers,
probes of its growth, tasks. The loss and what the run has spent end a stage early."""

from jax.sharding import Mesh

from stackjax.run.early_stop import settled, spent
from stackjax.run.growth_probe import open_probe, probe_is_due
from stackjax.run.held_out import held_out_layers, held_out_loss
from stackjax.run.run import Run
from stackjax.run.step_log import LateRows
from stackjax.run.task_scores import task_scores
from stackjax.training.phase import Counts, Phase
from stackjax.training.train_state import TrainState


class Observer:
    """Looks at the model of a phase after each step."""

    def __init__(self, run: Run, phase: Phase, mesh: Mesh, counts: Counts):
        config, phases = run.config, run.phases
        self._run, self._phase = run, phase
        self._is_final = phase.index == len(phases) - 1
        self._until = config.stages[phase.stage].until
        self._evaluate = held_out_loss(config, phase, run.held_out, mesh)
        self._measure = held_out_layers(config, phase, run.held_out, mesh)
        self._probe = open_probe(run, phase, phases)
        self._score = task_scores(config, phase, run.tasks, mesh)
        self._evaluations = run.evaluations(phase, counts)

    def look(
        self, step: int, before: Counts, counts: Counts, state: TrainState, rows: LateRows
    ) -> str | None:
        """Writes what is due after a step; returns why the stage ends there, if it does.

        Args:
          before: The counts before the step.
          counts: Those after it.
          state: That after it.
          rows: Is paused meanwhile.
        """
        run, config, phase = self._run, self._run.config, self._phase
        is_last, may_end = step == phase.num_steps, phase.trains_model(step)
        reason = spent(self._until, counts.tokens, counts.flops_6nd) if may_end else None
        # At the end of a phase whose model grows, the seam evaluates.
        is_due = counts.passes(config.evaluation.every_tokens, before) and not (
            is_last and phase.stage not in run.marker.ended
        )
        loss: float | None = None
        if is_due or (self._is_final and (is_last or reason is not None)):
            with rows.paused():
                loss, layers = self._evaluate(state), self._measure(state)
            run.write_evaluation(phase, step, counts, loss, layers)
            self._evaluations.append((counts.tokens - phase.start.tokens, loss))
            reason = reason or (settled(self._until, self._evaluations) if may_end else None)
        if self._probe is not None and probe_is_due(config, before.tokens, counts.tokens):
            with rows.paused():
                loss = self._evaluate(state) if loss is None else loss
                found = self._probe(state, counts)
            run.write_probe(phase, step, counts, loss, found)
        ends_run = self._is_final and (is_last or reason is not None)
        every = config.tasks.every_tokens
        if self._score is not None and (ends_run or (every and counts.passes(every, before))):
            with rows.paused():
                scores = self._score(state)
            run.write_scores(phase, step, counts, scores)
        return reason
