"""A LLaMA-style decoder as pure functions: `init`, `apply`, `logical_axes`.

Shapes: B batch, T time, D embed, V vocabulary (padded).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stackjax.model.attention import causal_attention, choose_kernel
from stackjax.model.attention_kernels import save_flash_residuals
from stackjax.model.block import Attend, Block, Turn
from stackjax.model.config import ModelConfig, RematPolicy
from stackjax.model.einsum import MLP_PRODUCT, PRODUCT, contract
from stackjax.model.layer_kind import LayerKind
from stackjax.model.layer_scan import joined, layers_between, scan_layers
from stackjax.model.layer_stack import init_layers
from stackjax.model.masking import Masking, capped
from stackjax.model.module import Module, Named, compute_dtype
from stackjax.model.parametrization import logits_factor
from stackjax.model.rotary import rotation
from stackjax.model.router import Routed
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import logical, num_shards, resharded
from stackjax.sharding.platform import platform_of, target_device

Params = dict[str, Any]

_EMBEDDING = Axes(reads=("vocab",), writes=("embed",))
_POSITIONS = Axes(reads=("positions",), writes=("embed",))
_HEAD = Axes(reads=("embed",), writes=("vocab",))

HEAD_PRODUCT = {True: "BTD,VD->BTV", False: "BTD,DV->BTV"}
"""The einsum of the output head, by `tie_head`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpan:
    """Consecutive layers executed by a single scan."""

    num_layers: int
    remat: RematPolicy
    unroll: int
    """As `ModelConfig.scan_unroll`."""
    trains: bool = True
    """Whether the layers have gradients. If any span is frozen, so is the token embedding."""


def all_layers(config: ModelConfig) -> LayerSpan:
    """Returns a single span with all layers, all trained."""
    return LayerSpan(
        num_layers=config.num_layers, remat=config.remat, unroll=config.scan_unroll
    )


class _Embedding(Module):
    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        table_VD = self.weight("embedding", _EMBEDDING)
        # To exchange the channels of tokens takes less communication than to gather the table
        # and to sum its gradient.
        tokens_BT = resharded(tokens_BT, logical("lookup_batch", None))
        layout = logical("lookup_batch", None, "embed")
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=layout)
        # Cast after the lookup, so that gradients of repeated tokens are summed in float32.
        x_BTD = x_BTD.astype(compute_dtype(self.config))
        if self.config.scale_embedding:
            # The factor, too, is rounded to the compute dtype.
            x_BTD *= jnp.asarray(math.sqrt(self.config.embed_dim), x_BTD.dtype)
        if self.config.positions == "learned":
            table_PD = self.weight("position_embedding", _POSITIONS)
            positions_BT = resharded(positions_BT, logical("lookup_batch", None))
            # Padding may come after the last position.
            added_BTD = table_PD.at[positions_BT].get(mode="clip", out_sharding=layout)
            x_BTD += added_BTD.astype(x_BTD.dtype)
        # With a step for each mesh axis, the compiler needs no gather.
        x_BTD = resharded(x_BTD, logical("lookup_batch", "seq", "lookup_embed"))
        return resharded(x_BTD, logical("batch", "seq", None))


class _Head(Module):
    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return logits(self.config, self.weight("head", _HEAD), x_BTD)


class _FinalNorm(Module):
    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        # The head is linear, so this is a factor of the logits.
        return self.norm("final_norm", x_BTD, "embed", factor=logits_factor(self.config))


def _init(module: nn.Module, key: jax.Array, *args: Any) -> dict[str, Any]:
    variables: Any = module.init(key, *args)
    return variables["params"]


def _call(module: nn.Module, params: Params, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


def _init_named(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns the parameter tree with axes; layers are stacked along the first axis."""
    embedding_key, layers_key, head_key = jax.random.split(key, 3)
    # Linen runs the modules to find the parameters, here on one token per shard.
    shape = (num_shards("batch"), num_shards("seq"))
    zeros_BT = jnp.zeros(shape, jnp.int32, out_sharding=logical("batch", "seq"))
    x_BTD = jnp.zeros(
        (*shape, config.embed_dim),
        compute_dtype(config),
        out_sharding=logical("batch", "seq", None),
    )
    turn = _rotation(config, LayerKind(), zeros_BT)

    def init_layer(has_experts: bool) -> Callable[[jax.Array], dict[str, Any]]:
        block = Block(config, has_experts)
        # Skip attention: the output has the shape of the queries.
        return lambda key: _init(block, key, x_BTD, turn, lambda q, k, v: (q, None))

    keys = jax.random.split(layers_key, config.num_layers)
    layers = init_layers(config, keys, init_layer)
    named = _init(_Embedding(config), embedding_key, zeros_BT, zeros_BT)
    named |= {"layers": layers} | _init(_FinalNorm(config), head_key, x_BTD)
    if not config.tie_head:
        named |= _init(_Head(config), head_key, x_BTD)
    return named


def _run_layers(
    config: ModelConfig,
    layers: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    spans: Sequence[LayerSpan],
) -> tuple[jax.Array, Routed | None]:
    run_layer, axes = layer_function(config, positions_BT, segments_BT), layer_axes(config)

    def run_spans(x_BTD: jax.Array, _: None) -> tuple[jax.Array, Routed | None]:
        start, routed = 0, []
        for span in spans:
            stop = start + span.num_layers
            part = layers
            if len(spans) > 1:
                part = layers_between(layers, axes, config, start, stop)
            if not span.trains:
                part = jax.lax.stop_gradient(part)
            unroll = layers_per_iteration(span)
            on_cpu = platform_of(target_device()) == "cpu"

            def body(kind: LayerKind) -> Any:
                def run(x: jax.Array, layer: Params) -> tuple[jax.Array, Routed | None]:
                    return run_layer(x, layer, kind)

                return run

            def remat(run: Any, is_inlined: bool) -> Any:
                # On a CPU, the compiler ignores the barrier.
                return _remat(run, span.remat, is_inlined and not on_cpu)  # noqa: B023

            x_BTD, of_span = scan_layers(body, x_BTD, part, config, start, unroll, axes, remat)
            routed.append(of_span)
            start = stop
        assert start == config.num_layers, "the spans do not cover the layers"
        return x_BTD, joined(routed)

    if config.loops == 1:
        return run_spans(x_BTD, None)
    whole = dataclasses.replace(all_layers(config), num_layers=config.depth)
    unroll = max(1, layers_per_iteration(whole) // max(1, config.num_layers))
    x_BTD, routed = jax.lax.scan(run_spans, x_BTD, length=config.loops, unroll=unroll)
    return x_BTD, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), routed)


def layer_function(
    config: ModelConfig, positions_BT: jax.Array, segments_BT: jax.Array | None
) -> Callable[[jax.Array, Params, LayerKind], tuple[jax.Array, Routed | None]]:
    """Returns a layer as a function (x_BTD, parameters, kind) -> (x_BTD, statistics).

    Layers with experts have the router's statistics, others None.
    """
    run_block = block_function(config, positions_BT)

    def run(
        x_BTD: jax.Array, layer: Params, kind: LayerKind
    ) -> tuple[jax.Array, Routed | None]:
        masking = Masking(kind.window, config.attention_cap)

        def attend(
            q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
        ) -> tuple[jax.Array, None]:
            kernel = choose_kernel(config, q_BTNH.dtype, q_BTNH.shape[1])
            return causal_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, kernel, masking), None

        x_BTD, _, routed = run_block(x_BTD, layer, kind, attend)
        return x_BTD, routed

    return run


def block_function(
    config: ModelConfig, positions_BT: jax.Array
) -> Callable[[jax.Array, Params, LayerKind, Attend], tuple[jax.Array, Any, Routed | None]]:
    """Returns a layer as a function (x_BTD, parameters, kind, attend) -> as `Block`."""
    # Without the barrier, the compiler recomputes the angles at every use.
    turns = {
        kind.angles: jax.lax.optimization_barrier(_rotation(config, kind, positions_BT))
        for kind in config.period_kinds
    }

    def run(
        x_BTD: jax.Array, layer: Params, kind: LayerKind, attend: Attend
    ) -> tuple[jax.Array, Any, Routed | None]:
        block = Block(config, config.has_experts(kind))
        return _call(block, layer, x_BTD, turns[kind.angles], attend)

    return run


def _rotation(config: ModelConfig, kind: LayerKind, positions_BT: jax.Array) -> Turn:
    if not kind.rotary or config.positions == "learned":
        return None
    theta, scaling = kind.rope_theta, kind.rope_scaling
    if theta is None:
        theta, scaling = config.rope_theta, config.rope_scaling
    return rotation(positions_BT, config.rotary_dim, theta, scaling)


def layers_per_iteration(span: LayerSpan) -> int:
    """Returns the number of layers per scan iteration."""
    if span.unroll == 0:
        # With remat, keep the loop: after unrolling, XLA recomputes early and uses more memory.
        on_cpu = platform_of(target_device()) == "cpu"
        is_unrolled = on_cpu and span.remat == "none"
        return max(1, span.num_layers) if is_unrolled else 1
    return max(1, min(span.unroll, span.num_layers))


def _remat(block: Any, policy: RematPolicy, barrier: bool) -> Any:
    """Returns the block with a rematerialization policy.

    Args:
      barrier: Recompute only after the layer's output gradient is known. Inside a loop, common
        subexpression elimination cannot undo the recomputation.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return block
    names = {"dots": (PRODUCT, MLP_PRODUCT), "lean": (PRODUCT,), "full": ()}[policy]
    saveable = policies.nothing_saveable
    if names:
        saved_products = policies.save_only_these_names(*names)
        saveable = policies.save_from_both_policies(saved_products, save_flash_residuals)
    return jax.checkpoint(block, policy=saveable, prevent_cse=barrier)


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    spans: Sequence[LayerSpan] | None = None,
) -> jax.Array:
    """Returns the next-token logits, at least float32 [B, T, V].

    Logits for vocabulary padding are -inf.

    Args:
      segments_BT: Document ids; tokens attend only within a document. None for one document
        per row.
      spans: Execution of the layers, from first to last; a single scan by default.
    """
    x_BTD = hidden(config, params, tokens_BT, positions_BT, segments_BT, spans)
    return unembed(config, params, x_BTD)


def hidden(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    spans: Sequence[LayerSpan] | None = None,
) -> jax.Array:
    """Returns the residual stream after the final norm, [B, T, D] in the compute dtype."""
    return hidden_and_routed(config, params, tokens_BT, positions_BT, segments_BT, spans)[0]


def hidden_and_routed(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    spans: Sequence[LayerSpan] | None = None,
) -> tuple[jax.Array, Routed | None]:
    """Returns `hidden`, and the statistics of all layers with experts, stacked."""
    if spans is None:
        spans = [all_layers(config)]
    x_BTD = embed(config, params, tokens_BT, positions_BT)
    if not all(span.trains for span in spans):
        # The embeddings are frozen too: layers below the first trained layer only run forward.
        x_BTD = jax.lax.stop_gradient(x_BTD)
    layers = params["layers"]
    x_BTD, routed = _run_layers(config, layers, x_BTD, positions_BT, segments_BT, spans)
    return final_norm(config, params, x_BTD), routed


def embed(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Returns the residual stream before the first layer, [B, T, D] in the compute dtype."""
    return _call(_Embedding(config), params, tokens_BT, positions_BT)


def final_norm(config: ModelConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Returns the normalized residual stream for the head, [B, T, D] in the compute dtype."""
    return _call(_FinalNorm(config), params, x_BTD)


def unembed(config: ModelConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Returns the next-token logits for a normalized stream, at least float32 [B, T, V]."""
    return logits(config, head_weight(config, params), x_BTD)


def head_weight(config: ModelConfig, params: Params) -> jax.Array:
    """Returns the stored head weight: [V, D] if tied to the embedding, else [D, V]."""
    return params["embedding" if config.tie_head else "head"]


def logits(config: ModelConfig, w: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Returns the next-token logits as in `unembed`, given only the head weight `w`."""
    sharding = logical("batch", "seq", "vocab")
    logits_BTV = contract(HEAD_PRODUCT[config.tie_head], x_BTD, w, sharding)
    wide = logits_BTV.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    wide = capped(wide, config.logit_cap)
    if config.vocab_size == config.padded_vocab_size:
        return wide
    token_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, wide.shape[-1]), 2)
    return jnp.where(token_V < config.vocab_size, wide, -jnp.inf)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Returns initial float32 parameters, sharded by logical axes if a mesh is set."""
    return nn.meta.unbox(_init_named(config, key))


@functools.cache
def logical_axes(config: ModelConfig) -> Any:
    """Returns the `Axes` of every parameter, as a tree like the parameters."""
    named = jax.eval_shape(lambda: _init_named(config, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: leaf.axes, named, is_leaf=lambda node: isinstance(node, Named)
    )


def layer_axes(config: ModelConfig) -> dict[str, str] | None:
    """Returns the stacked axis of each parameter in layers; None if it is `layers` for all."""
    if not config.is_mixed:
        return None
    axes = logical_axes(config)["layers"]
    return {name: names.layer_axis for name, names in axes.items()}
