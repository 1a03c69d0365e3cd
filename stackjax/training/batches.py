"""Batches of a phase."""

import itertools
from collections.abc import Iterator

from jax.sharding import Mesh

from stackjax.config import Config
from stackjax.data.batch import Batch
from stackjax.data.device import local_rows, put
from stackjax.data.loader import train_batches
from stackjax.data.sources import TokenSource
from stackjax.training.phase import Phase


def phase_batches(
    source: TokenSource,
    config: Config,
    phase: Phase,
    mesh: Mesh,
    first_example: int,
    num_steps: int,
) -> Iterator[Batch]:
    """Returns the batches for some steps of a phase, on the devices of the mesh."""
    num_rows = phase.batch_size // phase.accumulate
    batches = train_batches(
        source,
        config.data,
        seed=config.seed,
        first_example=first_example,
        batch_size=phase.batch_size,
        accumulate=phase.accumulate,
        rows=local_rows(mesh, num_rows),
    )
    return put(itertools.islice(batches, num_steps), mesh, num_rows)
