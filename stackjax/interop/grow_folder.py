"""Growth of a folder of transformers into another one, a tensor at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.growth import Growth
from stackjax.growth.values import fold_name
from stackjax.interop.huggingface import Folder, Slot, slots
from stackjax.interop.tensors import TensorInfo, check_finite
from stackjax.model import ModelConfig
from stackjax.model.config import axis_size
from stackjax.model.module import init_stddev
from stackjax.sharding.axes import Axes

_PART = 2**22
"""Numbers in a part of a tensor."""


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
    folder: Folder, growth: Growth, key: jax.Array, *, allow_nonfinite: bool = False
) -> Iterator[np.ndarray]:
    """Returns the tensors of the grown folder, in the order of its `grown_infos`.

    Tensors with a row for every token come in parts. Memory holds one part and its sources;
    copied tensors stay in their file.

    Raises:
      UserError: A number is NaN or infinite, and `allow_nonfinite` is false.
    """
    made_of = growth.layer_sources(folder.model)
    target = growth.target_config(folder.model)
    for slot in slots(target):
        for source in () if allow_nonfinite else _sources(slot, made_of):
            folder.check_finite(source)
        sources = [folder.read(source) for source in _sources(slot, made_of)]
        whole = np.stack(sources) if len(sources) > 1 else sources[0]
        if slot.layer is not None and len(sources) == 1:
            whole = whole[None]
        for i, leaf in enumerate(_parts(whole, slot.axes)):
            # The halves of a SwiGLU, and parts, are not to have the same noise.
            name = f"{slot.kind}.{slot.half}.{i}"
            form = _Form(name, slot.kind, slot.axes, slot.layer is None, leaf.shape, leaf.dtype)
            # Float64 is cut to float32 otherwise.
            with jax.enable_x64(leaf.dtype == np.float64):
                grow = _grower(growth, folder.model, form)
                grown = leaf if grow is None else np.asarray(grow(leaf, slot.layer, key))
            tensor = slot.to_tensor(grown if slot.layer is None else grown[0], target)
            if grow is not None and not allow_nonfinite:
                check_finite(tensor, slot.name, "the grown folder")
            yield tensor
            del grown, tensor  # before the next one is made


def _parts(whole: np.ndarray, axes: Axes) -> list[np.ndarray]:
    """Returns parts, none of them large, along the vocabulary: growth leaves that as it is."""
    if "vocab" not in axes.names:
        return [whole]
    axis = axes.names.index("vocab")
    number = -(-whole.size // _PART)
    return np.array_split(whole, min(number, whole.shape[axis]), axis)


def _sources(slot: Slot, made_of: np.ndarray) -> list[Slot]:
    """Returns the parts of the source that a part of the target is made of."""
    if slot.layer is None:
        return [slot]
    return [dataclasses.replace(slot, layer=int(layer)) for layer in made_of[slot.layer]]


@dataclasses.dataclass(frozen=True)
class _Form:
    """What a program that grows a part of a parameter depends on."""

    name: str
    kind: str
    axes: Axes
    is_outer: bool
    """Whether it belongs to no layer."""
    shape: tuple[int, ...]
    """[k, ...] of k layers; that of the parameter itself outside of layers."""
    dtype: np.dtype


@functools.lru_cache(maxsize=16)  # every kind of a layer; parts of tables come once
def _grower(
    growth: Growth, source: ModelConfig, form: _Form
) -> Callable[[np.ndarray, int | None, jax.Array], jax.Array] | None:
    """Returns a jitted function from a part of the source to that of the target.

    It takes the layer of the target, and randomness; of a layer it returns [1, ...]. None
    where the target's is the source's as it is.
    """
    # A folder has no padding of the vocabulary.
    source = dataclasses.replace(source, vocab_multiple=1)
    wide = jnp.promote_types(form.dtype, jnp.float32)
    name = form.name

    def grow(leaf: jax.Array, layer: jax.Array | int | None, key: jax.Array) -> jax.Array:
        grow_key, fresh_key = jax.random.split(key)
        fresh_key = fold_name(fresh_key, name)

        def fresh(config: ModelConfig) -> Any:
            return {name: _fresh(config, form, fresh_key)}

        def fresh_layer(config: ModelConfig, layer: jax.Array | int) -> Any:
            values = _fresh(config, form, jax.random.fold_in(fresh_key, layer))
            return {"layers": {name: values[None]}}

        if layer is None:
            tree, axes = {name: leaf}, {name: form.axes}
            grown = growth.grow_params(tree, axes, source, key=grow_key, fresh=fresh)
            return grown[name]
        tree, axes = {"layers": {name: leaf}}, {"layers": {name: form.axes.stack("layers")}}
        grown = growth.grow_layer(layer, tree, axes, source, key=grow_key, fresh=fresh_layer)
        return grown["layers"][name]

    layer = None if form.is_outer else 0
    leaf = jax.ShapeDtypeStruct(form.shape, wide)
    traced = jax.make_jaxpr(grow)(leaf, layer, jax.random.key(0)).jaxpr
    if traced.outvars == traced.invars[:1]:
        return None
    return jax.jit(lambda leaf, *args: grow(leaf.astype(wide), *args).astype(form.dtype))


def _fresh(config: ModelConfig, form: _Form, key: jax.Array) -> jax.Array:
    """Returns initial values, as `model.init` has them, of one layer's part of a parameter."""
    sizes = {name: axis_size(config, name) for name in form.axes.names}
    if "vocab" in sizes:
        sizes["vocab"] = form.shape[form.axes.names.index("vocab")]
    shape = tuple(sizes.values())
    if not form.axes.reads:
        return jnp.zeros(shape) if form.kind.endswith("_bias") else jnp.ones(shape)
    # Row by row: bits of all of them at once take several times the memory.
    keys = jax.random.split(key, shape[0])
    values = jax.lax.map(lambda row_key: jax.random.normal(row_key, shape[1:]), keys)
    return init_stddev(config, form.axes) * values
