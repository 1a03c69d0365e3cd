"""Scores on lm-evaluation-harness tasks, measured during training."""

from collections.abc import Mapping
from pathlib import Path

from stackjax.config import Config
from stackjax.inference.pretrained import Pretrained
from stackjax.inference.tasks import load_tasks, measure
from stackjax.run.hooks import Hook, StepInfo, every
from stackjax.run.init_from import run_tokenization
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import without_context
from stackjax.sharding.partition import move


def task_hooks(config: Config) -> list[Hook]:
    """Returns the hook that scores the model on the config's tasks; none without tasks.

    Fields have names such as `arc_easy/acc`.

    Raises:
      UserError: The harness is not installed, a task or a data file is missing, a field is
        out of range, or the tokenizer is gone.
    """
    fields = config.tasks
    if not fields.names:
        return []
    if not fields.every_tokens:
        raise UserError(
            f"tasks.names is set and tasks.every_tokens is {fields.every_tokens}; give the "
            f"number of tokens between two evaluations of the tasks."
        )
    tasks = load_tasks(
        fields.names,
        None if fields.directory is None else Path(fields.directory),
        num_fewshot=fields.num_fewshot,
        limit=fields.limit,
        batch_size=fields.batch_size,
    )
    tokenization = run_tokenization(config)

    def scores(step: StepInfo) -> Mapping[str, float | None]:
        mesh = without_context(step.mesh)
        pretrained = Pretrained(
            config=step.phase.model,
            params=move(step.params, mesh),
            mesh=mesh,
            tokenization=tokenization,
            seq_len=step.phase.seq_len,
        )
        return {
            f"{name}/{metric}": value
            for name, found in measure(tasks, pretrained).items()
            for metric, value in found["metrics"].items()
        }

    return [Hook(kind="tasks", when=every(fields.every_tokens), on_step=scores)]
