"""Logical axes map to mesh axes by the table; mesh sizes are checked."""

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
from stackjax.sharding.config import MeshConfig, mesh_axes
from stackjax.sharding.mesh import (
    build_mesh,
    mesh_shape,
    num_slices_of,
    slices_along_axes,
    without_context,
)
from stackjax.sharding.partition import logical, move, num_shards, on_mesh, partition

WEIGHT = Axes(("layers",), ("embed",), ("heads", "head_dim"))
GAIN = Axes(("layers",), (), ("embed",))


def test_mesh_size_minus_one_takes_remaining_devices():
    assert mesh_shape(MeshConfig(), 8) == (1, 8, 1, 1)
    assert mesh_shape(MeshConfig(replica=-1, fsdp=2), 8) == (4, 2, 1, 1)
    assert mesh_shape(MeshConfig(replica=2, fsdp=2, tensor=-1), 8) == (2, 2, 1, 2)
    assert mesh_shape(MeshConfig(replica=2, fsdp=2, tensor=2), 8) == (2, 2, 1, 2)
    assert mesh_shape(MeshConfig(fsdp=8, tensor=-1), 8) == (1, 8, 1, 1)
    assert mesh_shape(MeshConfig(fsdp=2), 8) == (4, 2, 1, 1)


def test_mesh_has_an_expert_axis_before_tensor_only_with_several_shards():
    config = MeshConfig(replica=1, expert=2, tensor=2)
    assert mesh_axes(config) == ("replica", "fsdp", "context", "expert", "tensor")
    assert mesh_shape(config, 8) == (1, 2, 1, 2, 2)
    assert mesh_shape(MeshConfig(context=2, expert=2), 8) == (1, 2, 2, 2, 1)
    assert "expert" not in mesh_axes(MeshConfig(fsdp=8))
    with jax.set_mesh(build_mesh(config)):
        assert num_shards("batch") == 4
        # `embed` and `experts` share a mesh axis, which the first dimension has.
        expert = Axes(("layers", "experts"), ("embed",), ("expert_mlp",))
        assert partition(expert) == P(None, "expert", ("fsdp", "context"), "tensor")
        router = Axes(("layers",), ("embed",), ("experts",))
        assert partition(router) == P(None, ("fsdp", "context", "expert"), None)


@pytest.mark.parametrize(
    ("config", "num_devices", "num_slices", "shape"),
    [
        (MeshConfig(), 32, 1, (1, 32, 1, 1)),
        (MeshConfig(), 64, 1, (2, 32, 1, 1)),
        (MeshConfig(), 256, 1, (8, 32, 1, 1)),
        (MeshConfig(), 48, 1, (2, 24, 1, 1)),
        (MeshConfig(tensor=4), 256, 1, (2, 32, 1, 4)),
        (MeshConfig(replica=1), 256, 1, (1, 256, 1, 1)),
        (MeshConfig(context=4), 256, 1, (8, 8, 4, 1)),
        (MeshConfig(fsdp=2, context=4), 8, 1, (1, 2, 4, 1)),
        # Parameters stay within a slice.
        (MeshConfig(), 32, 2, (2, 16, 1, 1)),
        (MeshConfig(), 512, 2, (16, 32, 1, 1)),
    ],
)
def test_default_fsdp_is_at_most_32_within_a_slice(config, num_devices, num_slices, shape):
    assert mesh_shape(config, num_devices, num_slices) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(replica=2, fsdp=2), "does not fit 8 devices; the sizes must multiply"),
        (MeshConfig(context=3), "does not fit 8 devices"),
        (MeshConfig(fsdp=-1, tensor=3), "does not fit 8 devices"),
        (MeshConfig(fsdp=16, tensor=-1), "does not fit 8 devices"),
        (MeshConfig(fsdp=-1, tensor=-1), "fsdp and tensor cannot both be -1"),
        (MeshConfig(fsdp=0), "sizes are at least 1, or -1"),
        (MeshConfig(fsdp=-2), "sizes are at least 1, or -1"),
    ],
)
def test_wrong_mesh_sizes_are_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mesh_shape(config, 8)


@pytest.mark.parametrize(
    ("shape", "num_slices", "across"),
    [
        ((2, 16, 1, 1), 2, (2, 1, 1, 1)),
        ((4, 16, 1, 2), 2, (2, 1, 1, 1)),
        ((1, 32, 1, 1), 2, (1, 2, 1, 1)),
        ((2, 16, 1, 1), 4, (2, 2, 1, 1)),
        ((8, 32, 1, 1), 8, (8, 1, 1, 1)),
    ],
)
def test_slices_span_replica_before_fsdp(shape, num_slices, across):
    assert slices_along_axes(shape, num_slices) == across


@pytest.mark.parametrize("shape", [(1, 16, 1, 2), (1, 1, 1, 32), (2, 8, 1, 2)])
def test_indivisible_slices_are_refused(shape):
    with pytest.raises(UserError, match=r"does not fit 3 TPU slices.*set mesh\.replica to 3"):
        slices_along_axes(shape, 3)


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """A device on a TPU slice, with the attributes that mesh layout reads."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "simulated"  # TPUs are laid out by their coordinates too
    device_kind: str = "simulated"


@pytest.mark.parametrize(
    "config", [MeshConfig(replica=1), MeshConfig(), MeshConfig(replica=1, tensor=2)]
)
def test_devices_of_a_slice_are_contiguous(config, monkeypatch):
    devices = [SliceDevice(i, i // 4) for i in range(8)]
    monkeypatch.setattr(mesh, "Mesh", lambda layout, *_, **__: layout)
    layout = build_mesh(config, devices)
    slices = np.vectorize(lambda device: device.slice_index)(layout)
    assert layout.shape == mesh_shape(config, 8, 2)
    first, second = np.split(slices, 2, axis=1 if config.replica == 1 else 0)
    assert (first == 0).all() and (second == 1).all()


@dataclasses.dataclass(frozen=True)
class HostDevice:
    """A described GPU on one of several hosts, with the attributes that mesh layout reads."""

    id: int
    process_index: int
    client: object
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "simulated"


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(replica=2)])
def test_replica_spans_gpu_hosts(config, monkeypatch):
    # By process, devices of a host need not follow each other.
    client = type("CompileOnlyClient", (), {})()
    devices = [HostDevice(i, i // 4, client) for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    monkeypatch.setattr(mesh, "Mesh", lambda layout, *_, **__: layout)
    layout = build_mesh(config, devices)
    assert layout.shape == (2, 4, 1, 1) and num_slices_of(devices) == 2
    hosts = np.vectorize(lambda device: device.process_index)(layout)
    assert (hosts[0] == 0).all() and (hosts[1] == 1).all()


def test_default_mesh_has_every_device():
    assert build_mesh(MeshConfig()).devices.size == jax.device_count() == 8


def test_weights_are_sharded_by_the_table_and_gains_replicated():
    with jax.set_mesh(mesh_of("replica 2, fsdp 2, tensor 2")):
        assert partition(WEIGHT) == P(None, ("fsdp", "context"), "tensor", None)
        assert partition(GAIN) == P(None, None)
        # The residual stream passes None for its channels.
        assert logical("batch", None, None) == P(("replica", "fsdp"), None, None)
        shards = [num_shards(name) for name in ("batch", "embed", "vocab", "head_dim")]
        assert shards == [4, 2, 2, 1]


def test_nothing_is_sharded_without_a_mesh():
    assert partition(WEIGHT) is None
    assert partition(GAIN) is None
    assert num_shards("batch") == 1


def test_abstract_arrays_keep_their_partition_specs_on_a_mesh():
    mesh = mesh_of("fsdp 4, tensor 2")
    with jax.set_mesh(mesh):
        zeros = lambda: jax.numpy.zeros((4, 8), out_sharding=P("fsdp", "tensor"))  # noqa: E731
        cut = jax.eval_shape(zeros)
    moved = on_mesh({"cut": cut, "scalar": jax.ShapeDtypeStruct((), "int32")}, mesh)
    assert moved["cut"].sharding.shard_shape((4, 8)) == (1, 4)
    assert moved["scalar"].sharding.is_fully_replicated


def test_parameters_keep_their_devices_without_context():
    before = build_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    after = without_context(before)
    assert after.shape == {"replica": 1, "fsdp": 4, "context": 1, "tensor": 2}
    with jax.set_mesh(before):
        w = jax.device_put(np.arange(2 * 8 * 4 * 3.0).reshape(2, 8, 4, 3), partition(WEIGHT))
    moved = move(w, after)
    for shard, other in zip(w.addressable_shards, moved.addressable_shards, strict=True):
        assert shard.device == other.device and shard.index == other.index
    with jax.set_mesh(after):
        assert num_shards("seq") == 1 and num_shards("batch") == 4
