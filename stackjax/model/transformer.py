"""A LLaMA-style decoder as pure functions: `init`, `apply`, `logical_axes`.

Shapes: B batch, T time, D embed, N query heads, K key/value heads, H head_dim, F mlp,
V vocabulary (padded), L layers. G is 2: the gate and the value of a SwiGLU.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from stackjax.axes import Axes
from stackjax.model.attention import causal_attention, choose_kernel, rotate, rotation
from stackjax.model.config import ModelConfig, RematPolicy, axis_size
from stackjax.model.contraction import PRODUCT, contract, gathered
from stackjax.sharding import logical, num_shards, partition

Params = dict[str, Any]

_EMBEDDING = Axes(reads=("vocab",), writes=("embed",))
_HEAD = Axes(reads=("embed",), writes=("vocab",))

HEAD_PRODUCT = {True: "BTD,VD->BTV", False: "BTD,DV->BTV"}
"""The einsum of the head, by whether it is the embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpan:
    """A run of consecutive layers that one scan executes."""

    num_layers: int
    remat: RematPolicy
    unroll: int
    """As `ModelConfig.scan_unroll`."""
    trains: bool = True
    """Whether the layers have gradients; unless all do, the embedding of tokens has none."""


class _Named(flax.struct.PyTreeNode, nn.meta.AxisMetadata[jax.Array]):
    """A parameter together with its axes, as initialisation returns it."""

    value: jax.Array
    axes: Axes = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        return self.value

    def replace_boxed(self, val: Any) -> "_Named":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Named":
        raise NotImplementedError("`init` stacks the layers, not a lifted transform.")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Named":
        raise NotImplementedError("`init` stacks the layers, not a lifted transform.")


class _Module(nn.Module):
    """A module whose parameters carry axes."""

    config: ModelConfig

    def weight(self, name: str, axes: Axes) -> jax.Array:
        """Returns a matrix as it is stored: float32, in shards."""
        shape = tuple(axis_size(self.config, axis) for axis in axes.names)

        def init(key: jax.Array) -> _Named:
            normal = jax.random.normal(key, shape, out_sharding=partition(axes))
            return _Named(init_stddev(self.config, axes) * normal, axes)

        stored: Any = self.param(name, init)
        return stored

    def norm(self, name: str, x: jax.Array, axis: str) -> jax.Array:
        """Returns RMSNorm (arXiv:1910.07467) over the last axis, in the type of `x`."""
        ones = jnp.ones((axis_size(self.config, axis),))
        gain: Any = self.param(name, lambda _: _Named(ones, Axes(writes=(axis,))))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(mean_square + self.config.norm_epsilon)
        return (wide * jnp.expand_dims(gain, range(x.ndim - 1))).astype(x.dtype)


class _Embedding(_Module):
    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        stored_VD = self.weight("embedding", _EMBEDDING)
        table_VD = gathered(stored_VD, stored_VD.dtype)
        # Cast last, so that the gradients of a token's uses are summed in float32.
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=logical("batch", None, None))
        return x_BTD.astype(compute_dtype(self.config))


class _Block(_Module):
    """Attention and SwiGLU, each reading the normalised residual stream and adding to it."""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        turn: tuple[jax.Array, jax.Array],
        segments_BT: jax.Array | None,
    ) -> jax.Array:
        h_BTD = self.norm("attention_norm", x_BTD, "embed")
        x_BTD += self.attention(h_BTD, turn, segments_BT)
        return x_BTD + self.mlp(self.norm("mlp_norm", x_BTD, "embed"))

    def attention(
        self,
        x_BTD: jax.Array,
        turn: tuple[jax.Array, jax.Array],
        segments_BT: jax.Array | None,
    ) -> jax.Array:
        def project(name: str, heads: str) -> jax.Array:
            w_DNH = self.weight(name, Axes(reads=("embed",), writes=(heads, "head_dim")))
            return contract("BTD,DNH->BTNH", x_BTD, w_DNH, logical("batch", None, heads, None))

        q_BTNH = project("query", "heads")
        k_BTKH = project("key", "kv_heads")
        v_BTKH = project("value", "kv_heads")
        if self.config.qk_norm:
            q_BTNH = self.norm("query_norm", q_BTNH, "head_dim")
            k_BTKH = self.norm("key_norm", k_BTKH, "head_dim")
        q_BTNH, k_BTKH = rotate(q_BTNH, *turn), rotate(k_BTKH, *turn)
        kernel = choose_kernel(self.config, x_BTD.dtype, x_BTD.shape[1])
        out_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, kernel)
        w_NHD = self.weight("out", Axes(reads=("heads", "head_dim"), writes=("embed",)))
        return contract("BTNH,NHD->BTD", out_BTNH, w_NHD, logical("batch", None, None))

    def mlp(self, x_BTD: jax.Array) -> jax.Array:
        # Gate and value in one array: one product of twice the width is faster than two.
        w_DGF = self.weight("gate_up", Axes(reads=("embed",), writes=("gate_up", "mlp")))
        h_BTGF = contract("BTD,DGF->BTGF", x_BTD, w_DGF, logical("batch", None, None, "mlp"))
        # The gradient of a split is a concatenation; that of two slices is padded and added.
        gate_BT1F, value_BT1F = jnp.split(h_BTGF, 2, axis=2)
        h_BTF = jnp.squeeze(nn.silu(gate_BT1F) * value_BT1F, axis=2)
        w_FD = self.weight("down", Axes(reads=("mlp",), writes=("embed",)))
        return contract("BTF,FD->BTD", h_BTF, w_FD, logical("batch", None, None))


class _Head(_Module):
    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return logits(self.config, self.weight("head", _HEAD), x_BTD)


class _FinalNorm(_Module):
    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.norm("final_norm", x_BTD, "embed")


def init_stddev(config: ModelConfig, axes: Axes) -> float:
    """Returns the standard deviation of a matrix's initial values.

    "reference" is what the code of arXiv:2405.15319 does: sqrt(2 / (5 fan_in)), the
    embedding as if its fan-in were embed_dim, and 1 / (sqrt(fan_in) layers) for the
    matrix that leaves the SwiGLU. "scaled" is GPT-2's: 0.02, and what writes into the
    residual stream over sqrt(2 layers).
    """
    embeds = axes.reads == ("vocab",)
    if config.init == "scaled":
        writes_residual = axes.writes == ("embed",) and not embeds
        return 0.02 / math.sqrt(2 * config.num_layers) if writes_residual else 0.02
    fan_in = math.prod(axis_size(config, axis) for axis in axes.reads)
    if axes.reads == ("mlp",):
        return 1 / (math.sqrt(fan_in) * config.num_layers)
    return math.sqrt(2 / (5 * (config.embed_dim if embeds else fan_in)))


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Returns the type of activations and matrix products on this backend."""
    if config.compute_dtype == "auto":
        on_cpu = jax.default_backend() == "cpu"
        return jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def _init(module: nn.Module, key: jax.Array, *args: Any) -> dict[str, Any]:
    variables: Any = module.init(key, *args)
    return variables["params"]


def _call(module: nn.Module, params: Params, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


def _init_named(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns the tree of parameters with their axes; the layers are stacked first."""
    embedding_key, layers_key, head_key = jax.random.split(key, 3)
    # No kernel is run for the shapes of its result.
    config = dataclasses.replace(config, attention="xla")
    # Linen finds parameters by running the modules: on one token for each batch shard.
    shape = (num_shards("batch"), 1)
    zeros_BT = jnp.zeros(shape, jnp.int32, out_sharding=logical("batch", None))
    x_BTD = jnp.zeros(
        (*shape, config.embed_dim),
        compute_dtype(config),
        out_sharding=logical("batch", None, None),
    )
    turn = rotation(zeros_BT, config.head_dim, config.rope_theta)

    def init_layer(layer_key: jax.Array) -> dict[str, Any]:
        return _init(_Block(config), layer_key, x_BTD, turn, zeros_BT)

    def is_named(node: Any) -> bool:
        return isinstance(node, _Named)

    layers = jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers))
    layers = jax.tree.map(
        lambda leaf: leaf.replace(axes=leaf.axes.stack("layers")),
        layers,
        is_leaf=is_named,
    )
    named = _init(_Embedding(config), embedding_key, zeros_BT)
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
) -> jax.Array:
    turn = rotation(positions_BT, config.head_dim, config.rope_theta)

    def block(x_BTD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        return _call(_Block(config), layer, x_BTD, turn, segments_BT), None

    start = 0
    for span in spans:
        stop = start + span.num_layers
        part = layers
        if len(spans) > 1:
            part = jax.tree.map(lambda leaf: leaf[start:stop], layers)  # noqa: B023
        if not span.trains:
            part = jax.lax.stop_gradient(part)
        body = _remat(block, span.remat)
        unroll = layers_per_iteration(span.unroll, span.num_layers)
        x_BTD, _ = jax.lax.scan(body, x_BTD, part, unroll=unroll)
        start = stop
    assert start == config.num_layers, "the spans do not cover the layers"
    return x_BTD


def layers_per_iteration(unroll: int, num_layers: int) -> int:
    """Returns how many layers each iteration of their scan runs, by `scan_unroll`."""
    if unroll == 0:
        return num_layers if jax.default_backend() == "cpu" else 1
    return min(unroll, num_layers)


def _remat(block: Any, policy: RematPolicy) -> Any:
    """Returns the block with what the policy names recomputed in the backward pass."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return block
    saveable = {
        "dots": policies.save_only_these_names(PRODUCT),
        "full": policies.nothing_saveable,
    }[policy]
    # Inside a scan the compiler cannot undo the recomputation, so it needs no barrier.
    return jax.checkpoint(block, policy=saveable, prevent_cse=False)


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    spans: Sequence[LayerSpan] | None = None,
) -> jax.Array:
    """Returns the logits of every next token, at least float32 [B, T, V].

    Logits of the vocabulary's padding are -inf.

    Args:
      spans: How the layers run, from first to last; by default in one scan, as `config`
        says.
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
    """Returns the residual stream after the final norm, [B, T, D] in the compute type."""
    if spans is None:
        whole = (config.num_layers, config.remat, config.scan_unroll)
        spans = [LayerSpan(num_layers=whole[0], remat=whole[1], unroll=whole[2])]
    x_BTD = _call(_Embedding(config), params, tokens_BT)
    if not all(span.trains for span in spans):
        # Tokens are not learnt either, so layers below the first that learns only run forward.
        x_BTD = jax.lax.stop_gradient(x_BTD)
    layers = params["layers"]
    x_BTD = _run_layers(config, layers, x_BTD, positions_BT, segments_BT, spans)
    return _call(_FinalNorm(config), params, x_BTD)


def unembed(config: ModelConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Returns the logits of the final residual stream, at least float32 [B, T, V]."""
    return logits(config, head_weight(config, params), x_BTD)


def head_weight(config: ModelConfig, params: Params) -> jax.Array:
    """Returns the weight of the head, as it is stored: [V, D] where it is tied, else [D, V]."""
    return params["embedding" if config.tie_head else "head"]


def logits(config: ModelConfig, w: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Returns `unembed` by the `head_weight` alone."""
    sharding = logical("batch", None, "vocab")
    logits_BTV = contract(HEAD_PRODUCT[config.tie_head], x_BTD, w, sharding)
    wide = logits_BTV.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    token_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, wide.shape[-1]), 2)
    return jnp.where(token_V < config.vocab_size, wide, -jnp.inf)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Returns float32 parameters, sharded by their axes where a mesh is set."""
    return nn.meta.unbox(_init_named(config, key))


@functools.cache
def logical_axes(config: ModelConfig) -> Any:
    """Returns the `Axes` of every parameter, as a tree shaped like the parameters."""
    named = jax.eval_shape(lambda: _init_named(config, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: leaf.axes, named, is_leaf=lambda node: isinstance(node, _Named)
    )
