"""Logical axes become partitions by one table, on a mesh whose sizes are checked."""

import re

import jax
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

from stackjax.axes import Axes
from stackjax.sharding import (
    MeshConfig,
    build_mesh,
    logical,
    mesh_shape,
    num_shards,
    on_mesh,
    partition,
)

WEIGHT = Axes(("layers",), ("embed",), ("heads", "head_dim"))
GAIN = Axes(("layers",), (), ("embed",))


def test_the_size_that_is_left_open_takes_the_devices_that_are_left():
    assert mesh_shape(MeshConfig(), 8) == (1, 8, 1)
    assert mesh_shape(MeshConfig(replica=-1, fsdp=2), 8) == (4, 2, 1)
    assert mesh_shape(MeshConfig(replica=2, fsdp=2, tensor=-1), 8) == (2, 2, 2)
    assert mesh_shape(MeshConfig(replica=2, fsdp=2, tensor=2), 8) == (2, 2, 2)
    assert mesh_shape(MeshConfig(fsdp=8, tensor=-1), 8) == (1, 8, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(replica=2, fsdp=2), "does not fit 8 devices; the sizes must multiply"),
        (MeshConfig(fsdp=-1, tensor=3), "does not fit 8 devices"),
        (MeshConfig(fsdp=16, tensor=-1), "does not fit 8 devices"),
        (MeshConfig(fsdp=-1, tensor=-1), "sizes are at least 1, and at most one is -1"),
        (MeshConfig(fsdp=0), "sizes are at least 1, and at most one is -1"),
        (MeshConfig(fsdp=-2), "sizes are at least 1, and at most one is -1"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices_are_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mesh_shape(config, 8)


def test_by_default_the_mesh_covers_every_device():
    assert build_mesh(MeshConfig()).devices.size == jax.device_count() == 8


def test_weights_are_cut_by_the_table_and_gains_stay_whole():
    with jax.set_mesh(mesh_of("replica 2, fsdp 2, tensor 2")):
        assert partition(WEIGHT) == P(None, "fsdp", "tensor", None)
        assert partition(GAIN) == P(None, None)
        # The residual stream names its channels None: it is whole.
        assert logical("batch", None, None) == P(("replica", "fsdp"), None, None)
        shards = [num_shards(name) for name in ("batch", "embed", "vocab", "head_dim")]
        assert shards == [4, 2, 2, 1]


def test_without_a_mesh_nothing_is_cut():
    assert partition(WEIGHT) is None
    assert partition(GAIN) is None
    assert num_shards("batch") == 1


def test_abstract_arrays_move_to_a_mesh_with_the_partitions_that_they_have():
    mesh = mesh_of("fsdp 4, tensor 2")
    with jax.set_mesh(mesh):
        zeros = lambda: jax.numpy.zeros((4, 8), out_sharding=P("fsdp", "tensor"))  # noqa: E731
        cut = jax.eval_shape(zeros)
    moved = on_mesh({"cut": cut, "scalar": jax.ShapeDtypeStruct((), "int32")}, mesh)
    assert moved["cut"].sharding.shard_shape((4, 8)) == (1, 4)
    assert moved["scalar"].sharding.is_fully_replicated
