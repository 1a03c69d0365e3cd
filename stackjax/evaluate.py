"""Loss on held-out sequences."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from stackjax.config import Config, EvaluationConfig
from stackjax.data.device import local_rows, put
from stackjax.data.loader import eval_batches
from stackjax.data.sources import TokenSource
from stackjax.phases import Phase
from stackjax.train_state import TrainState, eval_step


def check_held_out(config: EvaluationConfig, source: TokenSource) -> None:
    """Raises ValueError if there are fewer held-out sequences than an evaluation reads."""
    if config.num_sequences > len(source):
        raise ValueError(
            f"evaluation.num_sequences is {config.num_sequences}, but the split "
            f"{source.split!r} of {source.path!r} has {len(source)} sequences of "
            f"{source.seq_len} tokens; give --evaluation.num-sequences {len(source)}."
        )


def held_out_loss(
    config: Config, phase: Phase, source: TokenSource, mesh: Mesh
) -> Callable[[TrainState], float]:
    """Returns a function from states of a phase to their mean loss per token, in nats.

    It always reads the same sequences, and weighs every token alike.
    """
    step = jax.jit(functools.partial(eval_step, phase))
    num_rows = config.evaluation.batch_size

    def loss(state: TrainState) -> float:
        batches = eval_batches(
            source,
            config.data,
            num_sequences=config.evaluation.num_sequences,
            batch_size=num_rows,
            rows=local_rows(mesh, num_rows),
        )
        # All batches are under way before the first result is waited for.
        results = [step(state, batch) for batch in put(batches, mesh, num_rows)]
        nll = sum(float(sums.nll) for sums, _ in results)
        return nll / sum(float(weight) for _, weight in results)

    return loss
