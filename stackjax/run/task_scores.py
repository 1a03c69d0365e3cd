"""What the model scores on tasks of lm-evaluation-harness while it trains."""

from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from stackjax.config import Config
from stackjax.inference.pretrained import Pretrained
from stackjax.inference.tasks import Tasks, load_tasks, measure
from stackjax.run.init_from import run_tokenization
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenization import Tokenization
from stackjax.training.phase import Phase
from stackjax.training.train_state import TrainState


def open_tasks(config: Config) -> tuple[Tasks, Tokenization] | None:
    """Returns the tasks of a run and how its model reads texts; None if it has no tasks.

    Raises:
      UserError: The harness is not installed, a task or its data are not there, a field is
        out of range, or the tokenizer is gone.
    """
    tasks = config.tasks
    if not tasks.names:
        return None
    if not tasks.every_tokens:
        raise UserError(
            f"tasks.names is set and tasks.every_tokens is {tasks.every_tokens}; say how many "
            f"tokens lie between two rounds of them."
        )
    loaded = load_tasks(
        tasks.names,
        None if tasks.directory is None else Path(tasks.directory),
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        batch_size=tasks.batch_size,
    )
    return loaded, run_tokenization(config)


def task_scores(
    config: Config, phase: Phase, opened: tuple[Tasks, Tokenization] | None, mesh: Mesh
) -> Callable[[TrainState], dict[str, float | None]] | None:
    """Returns a function from states of a phase to the scores of what they run.

    By names such as `arc_easy/acc`. None where there are no tasks.

    Args:
      opened: What `open_tasks` has returned.
    """
    if opened is None:
        return None
    tasks, tokenization = opened
    # The model's parameters are new arrays only where others train.
    model_params = jax.jit(phase.model_params) if phase.reparameterisations else None

    def scores(state: TrainState) -> dict[str, float | None]:
        params = state.params
        if model_params is not None:
            params = model_params(state.params, state.step)
        pretrained = Pretrained(
            path=config.workdir,
            config=phase.model,
            params=params,
            mesh=mesh,
            tokenization=tokenization,
            seq_len=config.data.seq_len,
            lineage=(),
        )
        return {
            f"{name}/{metric}": value
            for name, found in measure(tasks, pretrained).items()
            for metric, value in found["metrics"].items()
        }

    return scores
