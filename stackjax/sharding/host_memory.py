"""Arrays in a host's memory, where only transfers to devices can reach them."""

from typing import Any

import jax

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
_KIND = "pinned_host"
"""JAX's name of the memory in a sharding."""


def on_host(tree: Any) -> Any:
    """Returns a tree with all arrays in the host's memory, except scalars.

    Works on arrays, on traced arrays, and on abstract arrays with a sharding.
    """
    return jax.tree.map(lambda leaf: _moved(leaf, _HOST) if leaf.ndim else leaf, tree)


def on_device(tree: Any) -> Any:
    """Returns a tree with all arrays in the devices' memory; only the host's are copied."""
    return jax.tree.map(lambda leaf: _moved(leaf, _DEVICE), tree)


def _moved(leaf: Any, space: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        assert space == _HOST and leaf.sharding is not None
        sharding = leaf.sharding.with_memory_kind(_KIND)  # type: ignore
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    # `jax.device_put` copies also within a memory.
    return leaf if jax.typeof(leaf).memory_space == space else jax.device_put(leaf, space)
