"""Loss and gradients do not depend on mesh, accumulation, remat, scan and chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import phase_of, random_batch, random_params, tiny_model

from stackjax import model
from stackjax.data.batch import Batch
from stackjax.data.device import batch_sharding
from stackjax.model.layer_kind import LayerKind
from stackjax.model.routing_config import Routing
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import on_mesh
from stackjax.training.train_state import TrainState, train_step

# Groups of two query heads, on up to four devices.
CONFIG = tiny_model(num_heads=8, num_kv_heads=4, head_dim=4)


def batch_of(accumulate: int) -> Batch:
    """Returns the same 16 rows, in `accumulate` microbatches."""
    batch = random_batch(rows=16)
    # Half the rows hardly count, so a mean of the microbatches' means would be wrong.
    batch.loss_weights[:, :8] *= 0.01
    return Batch(*(field.reshape(accumulate, -1, field.shape[-1]) for field in batch))


def keep_gradient() -> optax.GradientTransformation:
    """An optimizer that stores the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, *_, **__: (grads, grads),
    )


def loss_and_grads(mesh_config, accumulate, fields):
    """Returns loss and gradient of a train step, on a mesh unless None."""
    config, tx = dataclasses.replace(CONFIG, **fields), keep_gradient()
    phase = phase_of(config)
    step = jax.jit(functools.partial(train_step, phase, tx, 1e-2, phase.step_inputs))
    params, batch = random_params(config), batch_of(accumulate)
    if mesh_config is None:
        params = jax.device_put(params)
        state, metrics = step(TrainState(jnp.int32(0), params, tx.init(params)), batch)
        return metrics["loss"], state.opt_state
    mesh = build_mesh(mesh_config, jax.devices()[: 1 if mesh_config == MeshConfig() else 8])
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
        layout = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(abstract, mesh))
        params = jax.device_put(params, layout)
        state = TrainState(jnp.int32(0), params, tx.init(params))
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
    # Gradients are sharded like parameters.
    for leaf, place in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(layout), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    return metrics["loss"], state.opt_state


PLAIN = {"scan_unroll": 0, "remat": "none", "loss_chunk": 512}


@functools.cache
def expected_loss_and_grads(**fields):
    """The loss and gradient on one device, without mesh, accumulation and chunks."""
    return loss_and_grads(None, 1, PLAIN | fields)


# Mesh, microbatches, and how the model runs. Every remat, unroll, kind of chunk (3 leaves 2
# of 8 positions for the last one) and number of microbatches is on several meshes.
WAYS = [
    (None, 2, {"remat": "dots", "scan_unroll": 2, "loss_chunk": 3}),
    (MeshConfig(), 1, {"remat": "full", "scan_unroll": 1, "loss_chunk": 2}),
    (MeshConfig(fsdp=8), 2, {"remat": "none", "scan_unroll": 1, "loss_chunk": 3}),
    (MeshConfig(fsdp=4, tensor=2), 1, {"remat": "dots", "scan_unroll": 0, "loss_chunk": 4}),
    (MeshConfig(fsdp=2, tensor=4), 4, {"remat": "full", "scan_unroll": 2, "loss_chunk": 8}),
    (
        MeshConfig(replica=2, fsdp=2, tensor=2),
        1,
        {"remat": "none", "scan_unroll": 2, "loss_chunk": 2},
    ),
    # Whole sequences for some heads, then all keys for some queries.
    (MeshConfig(fsdp=2, context=4), 2, {"remat": "dots", "scan_unroll": 1, "loss_chunk": 2}),
    (
        MeshConfig(replica=2, context=2, tensor=2),
        2,
        {"remat": "dots", "scan_unroll": 1, "loss_chunk": 3},
    ),
    (MeshConfig(context=4, tensor=2), 1, {"remat": "none", "scan_unroll": 1, "loss_chunk": 1}),
]
PATTERN = {"num_layers": 5, "pattern": (LayerKind(window=3), LayerKind(rotary=False))}
LIKE_OLMO = {"qk_norm": True, "qk_norm_over": "all_heads", "norm_placement": "after"}
LIKE_GEMMA = {
    "norm_placement": "both",
    "unit_offset": True,
    "scale_embedding": True,
    "attention_cap": 2.0,
    "logit_cap": 3.0,
}
OF_KINDS = [
    (mesh, accumulate, fields | PATTERN) for mesh, accumulate, fields in (WAYS[0], *WAYS[3:7:3])
]
ROUTED = {"num_experts": 4, "expert_dim": 8, "routing": Routing(top_k=2, balance="none")}
# The balance loss is not additive over microbatches, so it has one.
BALANCED = {
    "num_layers": 5,
    "num_experts": 8,
    "expert_dim": 8,
    "num_shared_experts": 1,
    "pattern": (LayerKind(dense=True), LayerKind()),
    "routing": Routing(top_k=2, balance_weight=0.1, z_loss=0.1),
}
OF_EXPERTS = [
    (mesh, accumulate, fields | (ROUTED if accumulate > 1 else BALANCED))
    for mesh, accumulate, fields in (
        *(WAYS[0], WAYS[3], WAYS[7]),
        (MeshConfig(fsdp=2, expert=4), 1, WAYS[1][2]),
        (MeshConfig(replica=2, fsdp=2, expert=2), 2, WAYS[0][2]),
        (MeshConfig(fsdp=1, context=2, expert=2, tensor=2), 1, WAYS[3][2]),
        (MeshConfig(replica=1, fsdp=2, context=2, expert=2), 4, WAYS[4][2]),
    )
]
LIKE_GPT2 = {
    "norm": "layer",
    "positions": "learned",
    "max_seq_len": 8,
    "gated": False,
    **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "parallel_residual"), True),
}
OF_GPT2 = [(mesh, accumulate, fields | LIKE_GPT2) for mesh, accumulate, fields in WAYS[::3]]
OF_KINDS += [
    (mesh, 1, {"remat": "full"} | switches)
    for mesh in (MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=2, context=2, tensor=2))
    for switches in (LIKE_OLMO, LIKE_GEMMA)
]
LOOPED = [
    (mesh, accumulate, fields | {"loops": 3})
    for mesh, accumulate, fields in (WAYS[0], WAYS[3], WAYS[4], WAYS[7])
]


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("mesh", "accumulate", "fields"), [*WAYS, *LOOPED, *OF_KINDS, *OF_EXPERTS, *OF_GPT2]
)
def test_mesh_and_accumulation_do_not_change_loss_and_gradient(mesh, accumulate, fields):
    loss, grads = loss_and_grads(mesh, accumulate, fields)
    shape = {name: value for name, value in fields.items() if name not in PLAIN}
    expected_loss, expected = expected_loss_and_grads(**shape)
    # The same float32 sums in another order, on up to eight devices.
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for leaf, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        # Without rotation, the bias of keys has no gradient: only roundings.
        bound = max(1e-5 * np.abs(other).max(), 1e-7)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=bound)


@pytest.mark.slow
def test_bfloat16_loss_and_gradient_match_float32_up_to_rounding():
    fields = {"compute_dtype": "bfloat16", "remat": "full", "loss_chunk": 3}
    loss, grads = loss_and_grads(MeshConfig(fsdp=4, tensor=2), 2, fields)
    expected_loss, expected = expected_loss_and_grads()
    # Eight bits in each of some twenty products and sums, one after another; what is
    # wrong in part of a gradient is wrong by its own size.
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-2)
    for leaf, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.float64(leaf) - other)
        assert 0 < error < 5e-2 * np.linalg.norm(other)
