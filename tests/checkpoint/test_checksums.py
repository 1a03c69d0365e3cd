"""Checksums of array bits and their positions."""

import dataclasses
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MESHES, mesh_of, tiny_model, tiny_run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stackjax.checkpoint.checksums import by_path, checksums
from stackjax.checkpoint.saved_state import compile_checksums, to_save
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import abstract_state
from stackjax.training.expand import expand

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")


def array_of(dtype, shape=(8, 4, 6), seed=0):
    """Returns an array with random bits."""
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, 4), np.uint8)
    if dtype == "bool":
        return bits[..., 0] % 2 == 1
    width = jnp.dtype(dtype).itemsize
    return np.ascontiguousarray(bits[..., :width]).view(jnp.dtype(dtype))[..., 0]


def checksum(array):
    return tuple(np.asarray(checksums({"x": jnp.asarray(array)}))[0])


def reference(words):
    """Computes both checksums with Python integers from 32-bit words."""
    strides, stride = [], 0x9E3779B1
    for size in reversed(words.shape):
        strides.insert(0, stride)
        stride = stride * size + 2
    first = second = 0
    for index, word in np.ndenumerate(words):
        place = 0x85EBCA6B + sum(i * s for i, s in zip(index, strides, strict=True))
        x = (int(word) ^ place) % 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        x ^= x >> 16
        first, second = first + x, second + x * (place | 1)
    return first % 2**32, second % 2**32


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2), (0, 3)])
def test_checksums_match_a_reference_in_python_integers(shape):
    words = np.random.default_rng(1).integers(0, 2**32, shape, np.uint32)
    assert checksum(words) == reference(words)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_the_checksum(dtype):
    array = array_of(dtype, (3, 5))
    whole, width = checksum(array), array.dtype.itemsize
    seen = set()
    for bit in range(8 * array.nbytes if dtype != "bool" else 0):
        flipped = bytearray(array.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        damaged = np.frombuffer(bytes(flipped), array.dtype).reshape(array.shape)
        seen.add(checksum(damaged))
    if dtype == "bool":
        for place in np.ndindex(array.shape):
            flipped = array.copy()
            flipped[place] ^= True
            seen.add(checksum(flipped))
    # All checksums differ from the original checksum and from each other.
    assert whole not in seen
    assert len(seen) == (array.size if dtype == "bool" else array.size * width * 8)


DAMAGES = {
    "two flipped signs": lambda x: np.concatenate([-x[:2], x[2:]]),
    "a block of zeros": lambda x: np.concatenate([np.zeros_like(x[:1]), x[1:]]),
    "two blocks swapped": lambda x: np.concatenate([x[1:2], x[:1], x[2:]]),
    "rows in another order": lambda x: x[::-1],
    "channels swapped": lambda x: x[..., ::-1],
    "axes swapped": lambda x: x.transpose(0, 2, 1).reshape(x.shape),
    "another shape": lambda x: x.reshape(x.shape[0] // 2, -1),
    "a negative zero": lambda x: np.where(x == x[0, 0, 0], -0.0, x),
    "values turned into NaN": lambda x: (x.view(np.uint32) | 0x7FC00000).view(np.float32),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_other_damage_changes_the_checksum(name):
    array = np.random.default_rng(2).normal(size=(8, 4, 6)).astype(np.float32)
    array[0, 0, 0] = 0.0
    assert checksum(DAMAGES[name](array)) != checksum(array)


def test_constant_and_one_hot_arrays_have_distinct_checksums():
    ones = {checksum(np.full((4, 4), value, np.float32)) for value in (0, 1, -1, 2, 0.5)}
    single = np.eye(16, dtype=np.float32).reshape(16, 4, 4)
    assert len(ones | {checksum(each) for each in single}) == 5 + 16


@pytest.mark.parametrize("name", MESHES)
def test_checksums_are_equal_on_every_mesh(name):
    tree = {"a": array_of("float32", (8, 16, 4)), "b": array_of("bfloat16", (16, 2))}
    alone = np.asarray(checksums(jax.tree.map(jnp.asarray, tree)))
    mesh = mesh_of(name)
    specs = {"a": P(("replica", "fsdp"), "tensor"), "b": P("fsdp")}
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
            for name, leaf in tree.items()
        }
        found = checksums(placed)
        assert found.sharding.is_fully_replicated
        np.testing.assert_array_equal(found, alone)


def test_checksums_copy_and_gather_no_array():
    mesh = mesh_of("fsdp 4, tensor 2")
    with jax.set_mesh(mesh):
        big = jax.ShapeDtypeStruct(
            (64, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor"))
        )
        memory = checksums.lower({"x": big}).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64**3 * 4 / 8 / 100


def test_random_keys_have_a_checksum():
    assert checksum(jax.random.key(0)) != checksum(jax.random.key(1))


def test_checksum_rows_follow_the_path_order():
    tree = {"z": jnp.zeros(2), "a": {"c": jnp.ones(3), "b": jnp.int32(4)}}
    assert list(by_path(tree)) == ["a.b", "a.c", "z"]
    rows = np.asarray(checksums(tree))
    assert [tuple(row) for row in rows] == [checksum(leaf) for leaf in by_path(tree).values()]


def test_first_save_reuses_the_precompiled_checksum_program(caplog):
    config = tiny_run(model=tiny_model(num_layers=2))
    phase = expand(config)[0]
    mesh = build_mesh(phase.mesh)
    with futures.ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(compile_checksums, phase).result()

    def compiled(tree) -> bool:
        caplog.clear()
        with jax.log_compiles(), jax.set_mesh(mesh):
            jax.block_until_ready(tree())
        return any("checksums" in message for message in caplog.messages)

    with jax.set_mesh(mesh):
        layout = on_mesh(abstract_state(phase), mesh)
        state = jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), layout
        )
    assert not compiled(lambda: to_save(state))
    assert compiled(lambda: to_save(dataclasses.replace(state, opt_state=None)))
