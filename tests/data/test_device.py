"""Batch transfer to devices: order, prefetch and errors."""

import itertools
import threading

import jax
import numpy as np
import pytest

from stackjax.data.batch import Batch
from stackjax.data.device import batch_sharding, put
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.mesh import build_mesh

ROWS, T = 8, 4


def batches(read: list[int] | None = None):
    """Yields batches; row b of batch i is filled with 10 i + b."""
    for index in itertools.count():
        if read is not None:
            read.append(index)
        filled = np.broadcast_to(10 * index + np.arange(ROWS)[None, :, None], (1, ROWS, T))
        yield Batch(filled, filled, None, filled.astype(np.float32))


@pytest.fixture(params=[{}, {"fsdp": 2, "tensor": 4}, {"replica": 4, "tensor": 2}])
def mesh(request):
    mesh = build_mesh(MeshConfig(**request.param))
    with jax.set_mesh(mesh):
        yield mesh


def test_batches_arrive_complete_and_in_order(mesh):
    sent = list(put(itertools.islice(batches(), 5), mesh, ROWS))
    assert len(sent) == 5
    for batch, expected in zip(sent, batches(), strict=False):
        jax.tree.map(np.testing.assert_array_equal, batch, expected)
        assert batch.tokens.sharding == batch_sharding(mesh)


def test_sequences_are_sharded_along_context():
    mesh, field = build_mesh(MeshConfig(context=4)), np.arange(ROWS * T).reshape(1, ROWS, T)
    with jax.set_mesh(mesh):
        (sent,) = put([Batch(field, field, None, field)], mesh, ROWS)
    np.testing.assert_array_equal(sent.tokens, field)
    assert sent.tokens.sharding.shard_shape(field.shape) == (1, ROWS // 2, T // 4)


def test_exactly_one_batch_is_sent_ahead(mesh):
    read: list[int] = []
    sent = put(batches(read), mesh, ROWS)
    for _ in range(3):
        next(sent)
    sent.close()  # waits for the batch in flight
    assert read == [0, 1, 2, 3]


def test_read_errors_arrive_in_order_and_end_the_thread(mesh):
    def damaged():
        yield from itertools.islice(batches(), 2)
        raise OSError("record 3 is damaged")

    before = threading.active_count()
    sent = put(damaged(), mesh, ROWS)
    assert [int(np.max(next(sent).tokens)) for _ in range(2)] == [7, 17]
    with pytest.raises(OSError, match="record 3 is damaged"):
        next(sent)
    assert threading.active_count() == before
