"""Growth of a folder of transformers into another one, a tensor at a time."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.axes import Axes
from stackjax.growth import Growth
from stackjax.growth.base import fold_name
from stackjax.interop.huggingface import Folder, Slot, slots
from stackjax.interop.tensors import TensorInfo
from stackjax.model import ModelConfig
from stackjax.model.config import axis_size
from stackjax.model.module import init_stddev


def grown_infos(folder: Folder, growth: Growth) -> dict[str, TensorInfo]:
    """Returns the tensors of the grown folder, of the types of those that they are made of."""
    made_of = growth.layer_sources(folder.model)
    target = growth.target_config(folder.model)
    return {
        slot.name: TensorInfo(
            slot.shape(target), folder.tensors[_sources(slot, made_of)[0].name].dtype
        )
        for slot in slots(target)
    }


def grown_tensors(
    folder: Folder, growth: Growth, infos: Mapping[str, TensorInfo], key: jax.Array
) -> Iterator[np.ndarray]:
    """Returns the tensors of the grown folder, in the order of `infos`, its `grown_infos`.

    Memory holds one of them, and those that it is made of.
    """
    made_of = growth.layer_sources(folder.model)
    target = growth.target_config(folder.model)
    for slot in slots(target):
        parts = [folder.read(source) for source in _sources(slot, made_of)]
        # Without a copy where there is one, as there mostly is.
        leaf = np.stack(parts) if len(parts) > 1 else parts[0][None]
        # Float64 is cut to float32 otherwise.
        with jax.enable_x64(infos[slot.name].dtype == "F64"):
            grow = _grow_function(growth, folder.model, slot.kind, slot.half, slot.axes)
            grown = np.asarray(grow(leaf, slot.layer, key))
        yield slot.to_tensor(grown[0], target)


def _sources(slot: Slot, made_of: np.ndarray) -> list[Slot]:
    """Returns the parts of the source that a part of the target is made of."""
    if slot.layer is None:
        return [slot]
    return [dataclasses.replace(slot, layer=int(layer)) for layer in made_of[slot.layer]]


@functools.cache
def _grow_function(
    growth: Growth, source: ModelConfig, kind: str, half: int | None, axes: Axes
) -> Any:
    """Returns a jitted function from parameters, [k, ...], to the grown one, [1, ...].

    It takes the layer that grows, None outside of layers, and the randomness.
    """
    # The halves of a SwiGLU are two parameters here, and not to have the same noise.
    name = kind if half is None else f"{kind}.{half}"
    # A folder has no padding of the vocabulary.
    source = dataclasses.replace(source, vocab_multiple=1)

    def grow(leaf_K: jax.Array, layer: jax.Array | None, key: jax.Array) -> jax.Array:
        wide_K = leaf_K.astype(jnp.promote_types(leaf_K.dtype, jnp.float32))
        grow_key, fresh_key = jax.random.split(key)
        fresh_key = fold_name(fresh_key, name)
        if layer is None:
            grown = growth.grow_params(
                {name: wide_K[0]},
                {name: axes},
                source,
                key=grow_key,
                fresh=lambda config: {name: _fresh(config, kind, axes, fresh_key)},
            )[name][None]
        else:
            grown = growth.grow_layer(
                layer,
                {"layers": {name: wide_K}},
                {"layers": {name: axes.stack("layers")}},
                source,
                key=grow_key,
                fresh=lambda config, layer: {
                    "layers": {
                        name: _fresh(config, kind, axes, jax.random.fold_in(fresh_key, layer))[
                            None
                        ]
                    }
                },
            )["layers"][name]
        return grown.astype(leaf_K.dtype)

    return jax.jit(grow)


def _fresh(config: ModelConfig, kind: str, axes: Axes, key: jax.Array) -> jax.Array:
    """Returns initial values, as `model.init` has them, of one parameter of one layer."""
    shape = tuple(axis_size(config, name) for name in axes.names)
    if axes.reads:
        return init_stddev(config, axes) * jax.random.normal(key, shape)
    return jnp.zeros(shape) if kind.endswith("_bias") else jnp.ones(shape)
