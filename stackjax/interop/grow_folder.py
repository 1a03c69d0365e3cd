"""Growth of a Hugging Face folder, parameter by parameter."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from stackjax import model
from stackjax.growth import Growth
from stackjax.growth.axis_map import NEW
from stackjax.growth.grow_tree import grow_tree
from stackjax.interop.huggingface import Folder, load_part
from stackjax.interop.slots import Slot, kinds_of, slot_groups, slots_by_kind, to_tensors
from stackjax.interop.tensors import DTYPES, TensorInfo, widest
from stackjax.sharding.mesh import largest_mesh


def grown_infos(folder: Folder, growth: Growth) -> dict[str, TensorInfo]:
    """Returns shapes and types of the grown tensors, in file order.

    A tensor has the type of the same tensor in the source layer; in layers without a source,
    the type in the first layer.
    """
    maps, target = growth.axis_maps(folder.model), growth.target_config(folder.model)
    layers = maps["layers"].sources if "layers" in maps else range(target.num_layers)
    layers = [0 if layer == NEW else layer for layer in layers]

    def info(slot: Slot) -> TensorInfo:
        source = slot if slot.layer is None else slot.in_layer(layers[slot.layer])
        return TensorInfo(slot.shape(target), folder.tensors[source.name].dtype)

    stored = itertools.chain(*slot_groups(target, folder.model_type))
    return {slot.name: info(slot) for slot in stored}


def grown_tensors(
    folder: Folder,
    growth: Growth,
    infos: Mapping[str, TensorInfo],
    key: jax.Array,
    *,
    allow_nonfinite: bool = False,
) -> Iterator[np.ndarray]:
    """Yields the grown tensors in the order of `infos`.

    Memory holds a single parameter, or all parameters of a tensor: all layers of the source and
    of the target.

    Args:
      infos: The `grown_infos`.
      key: Randomness of the operator.

    Raises:
      UserError: A number is NaN or infinite, and `allow_nonfinite` is false.
    """
    # A folder has no vocabulary padding.
    source = dataclasses.replace(folder.model, vocab_multiple=1)
    target, axes = growth.target_config(source), model.logical_axes(source)
    where = None if allow_nonfinite else "the grown folder"
    stored = slots_by_kind(source, folder.model_type)
    for group in slot_groups(target, folder.model_type):
        kinds, in_layers = kinds_of(group), group[0].layer is not None
        part = {kind: (axes["layers"] if in_layers else axes)[kind] for kind in kinds}
        part = {"layers": part} if in_layers else part
        types = [folder.dtypes[slot.name] for kind in kinds for slot in stored[kind]]
        dtype = jnp.promote_types(DTYPES[widest(types)], jnp.float32)
        mesh = largest_mesh(1)
        # Without x64, JAX converts float64 to float32.
        with jax.set_mesh(mesh), jax.enable_x64(dtype == np.float64):
            params = load_part(
                folder, source, part, mesh, dtype, allow_nonfinite=allow_nonfinite
            )
            params = jax.jit(grow_tree, static_argnums=(0, 1))(growth, source, params, key)
            grown = jax.tree.map(np.asarray, params["layers"] if in_layers else params)
        yield from to_tensors(grown, group, target, infos, where)
        del params, grown  # before the next group is read
