"""Transfer of batches to the devices."""

from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stackjax.data.batch import Batch
from stackjax.sharding.partition import logical, num_shards


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch field [accumulate, B, T]."""
    spec = logical(None, "batch", "seq")
    assert spec is not None, "a mesh is set wherever batches are"
    return NamedSharding(mesh, spec)


def put_rows(rows: np.ndarray) -> jax.Array:
    """Returns an array on the current mesh, sharded along the first axis, the rows.

    Args:
      rows: The same array in every process.
    """
    spec = logical("batch", *(None,) * (rows.ndim - 1))
    assert spec is not None, "a mesh is set wherever batches are"
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Returns the batch rows on this process's devices, ascending indices below B."""
    shape = (1, num_rows, num_shards("seq"))
    indices = batch_sharding(mesh).addressable_devices_indices_map(shape)
    rows = [np.arange(num_rows)[index[1]] for index in indices.values() if index]
    return np.unique(np.concatenate(rows))


def put(batches: Iterable[Batch], mesh: Mesh, num_rows: int) -> Iterator[Batch]:
    """Yields batches with `num_rows` rows on the mesh.

    A thread reads and sends the next batch during the current step.
    """
    sharding, rows, unsent = batch_sharding(mesh), local_rows(mesh, num_rows), iter(batches)

    def send(field: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(num_rows)
            first = np.searchsorted(rows, start)
            return field[:, first : first + stop - start, index[2]]

        # Takes half as long as `jax.make_array_from_process_local_data`.
        shape = (field.shape[0], num_rows, field.shape[2])
        return jax.make_array_from_callback(shape, sharding, shard)

    def send_next() -> Batch | None:
        batch = next(unsent, None)
        return None if batch is None else jax.tree.map(send, batch)

    with futures.ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(send_next)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(send_next)
            yield batch
