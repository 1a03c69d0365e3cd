"""A phase's learning rate, from the schedule in the config."""

from stackjax.config import Schedule
from stackjax.runtime.errors import UserError
from stackjax.training.learning_rate import LearningRate
from stackjax.training.phase import Waypoint
from stackjax.training.phase_config import PhaseConfig


def scheduled_rate(
    parts: PhaseConfig, waypoint: Waypoint, num_steps: int, run_tokens: int
) -> LearningRate:
    """Returns a phase's learning rate.

    Args:
      waypoint: The phase's newest step with known counts.
      num_steps: The phase's steps.
      run_tokens: The run's planned tokens.

    Raises:
      UserError: The schedule has no decay, or is longer than its horizon.
    """
    stage, config = parts.stage, parts.config
    tokens_per_step = parts.per_step.tokens
    # Extrapolated to step 0 at the present batch size.
    first = waypoint.counts.tokens - waypoint.step * tokens_per_step
    first_of_phase = first - parts.train_start
    schedule, peak = stage.schedule or config.optimizer.schedule, stage.peak_learning_rate
    if parts.fit is not None:
        schedule, peak = Schedule(shape="constant"), parts.fit.learning_rate
    horizon = schedule.horizon_tokens
    if horizon is None:
        end = parts.stage_end(first + num_steps * tokens_per_step)
        length = end - parts.train_start
        horizon = run_tokens if schedule.axis == "run" else length
    _check_schedule(parts.index, schedule, horizon)
    warmup, decay = schedule.warmup_tokens, schedule.decay_tokens or 0
    decay_start = warmup if schedule.shape == "cosine" else horizon - decay
    return LearningRate(
        shape=schedule.shape,
        peak=config.optimizer.peak_learning_rate if peak is None else peak,
        warmup_tokens=float(warmup),
        decay_start=float(decay_start),
        decay_tokens=float(horizon - decay_start),
        final_fraction=schedule.final_fraction,
        first_tokens=float(first if schedule.axis == "run" else first_of_phase),
        tokens_per_step=float(tokens_per_step),
    )


def _check_schedule(stage: int, schedule: Schedule, horizon: int) -> None:
    """Raises UserError for a schedule without decay, or longer than the horizon."""
    if schedule.shape == "wsd" and schedule.decay_tokens is None:
        raise UserError(
            f"the schedule of stages.{stage} is wsd without decay_tokens; say how many "
            f"tokens its decay takes."
        )
    if schedule.warmup_tokens + (schedule.decay_tokens or 0) > horizon:
        raise UserError(
            f"the schedule of stages.{stage} warms up over {schedule.warmup_tokens} and "
            f"decays over {schedule.decay_tokens or 0} tokens, which is more than its "
            f"horizon of {horizon}; lower schedule.warmup_tokens or schedule.decay_tokens, or "
            f"train longer."
        )
