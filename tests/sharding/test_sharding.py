"""Logical axes become partitions by one table, on a mesh whose sizes are checked."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

from stackjax.runtime.errors import UserError
from stackjax.sharding import mesh
from stackjax.sharding.axes import Axes
from stackjax.sharding.mesh import MeshConfig, build_mesh, mesh_shape, slices_along_axes
from stackjax.sharding.partition import logical, num_shards, on_mesh, partition

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


@pytest.mark.parametrize(
    ("shape", "num_slices", "across"),
    [
        ((2, 16, 1), 2, (2, 1, 1)),
        ((4, 16, 2), 2, (2, 1, 1)),
        ((1, 32, 1), 2, (1, 2, 1)),
        ((2, 16, 1), 4, (2, 2, 1)),
        ((8, 32, 1), 8, (8, 1, 1)),
    ],
)
def test_slices_lie_along_replica_first_and_then_along_fsdp(shape, num_slices, across):
    assert slices_along_axes(shape, num_slices) == across


@pytest.mark.parametrize("shape", [(1, 16, 2), (1, 1, 32), (2, 8, 2)])
def test_slices_that_neither_replica_nor_fsdp_can_span_are_refused(shape):
    with pytest.raises(UserError, match=r"does not fit 3 TPU slices.*set mesh\.replica to 3"):
        slices_along_axes(shape, 3)


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """A device of a TPU slice, as far as laying out a mesh asks."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "simulated"  # TPUs are laid out by their coordinates too
    device_kind: str = "simulated"


@pytest.mark.parametrize("config", [MeshConfig(replica=2), MeshConfig(), MeshConfig(tensor=2)])
def test_devices_of_one_slice_are_neighbours_along_every_axis_but_one(config, monkeypatch):
    devices = [SliceDevice(i, i // 4) for i in range(8)]
    monkeypatch.setattr(mesh, "Mesh", lambda layout, *_, **__: layout)
    layout = build_mesh(config, devices)
    slices = np.vectorize(lambda device: device.slice_index)(layout)
    assert layout.shape == mesh_shape(config, 8)
    first, second = np.split(slices, 2, axis=0 if config.replica == 2 else 1)
    assert (first == 0).all() and (second == 1).all()


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
