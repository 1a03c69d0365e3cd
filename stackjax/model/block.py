"""A decoder layer: attention, and an MLP or experts, on a residual stream.

Shapes: B batch, T time, D embed, N query heads, K key/value heads, H head_dim, F mlp, E
experts, S shared experts. G is 2: gate and value of a SwiGLU.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stackjax.model.activation import GATED, UNGATED, recomputed
from stackjax.model.einsum import MLP_PRODUCT, contract
from stackjax.model.experts import mixture
from stackjax.model.module import Module
from stackjax.model.parametrization import branch_factor, query_factor, scaled
from stackjax.model.rotary import rotate
from stackjax.model.router import Routed, route
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import logical

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""Attention function: (q_BTNH, k_BTKH, v_BTKH) -> (output [B, T, N, H], auxiliary output such
as a KV cache). Queries and keys are already rotated."""

Turn = tuple[jax.Array, jax.Array] | None
"""Cosine and signed sine for rotary positions; None for a layer without them."""


class Block(Module):
    """A decoder layer: x + attention(norm(x)), then x + MLP(norm(x)).

    With `parallel_residual`, x + attention(norm(x)) + MLP(norm(x)). `norm_placement` moves the
    norms to the outputs of both branches, or adds norms there. With CompleteP, both branches
    are multiplied by `branch_factor`.
    """

    has_experts: bool = False
    """Whether the second branch is a mixture of experts instead of one MLP."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, turn: Turn, attend: Attend
    ) -> tuple[jax.Array, Any, Routed | None]:
        """Returns the residual stream [B, T, D], the auxiliary output of `attend`, and the
        router's statistics in a layer with experts."""
        stream_BTD = x_BTD
        read_BTD, left = self.attention(self.before("attention", x_BTD), turn, attend)
        read_BTD = self.after("attention", read_BTD)
        x_BTD += scaled(read_BTD, branch_factor(self.config))
        seen_BTD = stream_BTD if self.config.parallel_residual else x_BTD
        made_BTD, routed = self.before("mlp", seen_BTD), None
        if self.has_experts:
            made_BTD, routed = self.experts(made_BTD)
        else:
            made_BTD = self.mlp(made_BTD)
        made_BTD = self.after("mlp", made_BTD)
        return x_BTD + scaled(made_BTD, branch_factor(self.config)), left, routed

    def before(self, branch: str, x_BTD: jax.Array) -> jax.Array:
        """Returns a branch's input."""
        if self.config.norm_placement == "after":
            return x_BTD
        return self.norm(f"{branch}_norm", x_BTD, "embed")

    def after(self, branch: str, x_BTD: jax.Array) -> jax.Array:
        """Returns a branch's output, for the residual stream."""
        if self.config.norm_placement == "before":
            return x_BTD
        return self.norm(f"{branch}_out_norm", x_BTD, "embed", joins=True)

    def writer(self, *reads: str, stacked: tuple[str, ...] = ()) -> Axes:
        """Returns the axes for a branch's last matrix."""
        joins = None if self.config.norm_placement == "before" else False
        return Axes(stacked, reads, ("embed",), joins=joins)

    def attention(self, x_BTD: jax.Array, turn: Turn, attend: Attend) -> tuple[jax.Array, Any]:
        def project(name: str, heads: str) -> jax.Array:
            w_DNH = self.weight(name, Axes(reads=("embed",), writes=(heads, "head_dim")))
            layout = logical("batch", "seq", heads, None)
            y_BTNH = contract("BTD,DNH->BTNH", x_BTD, w_DNH, layout)
            if self.config.qkv_bias:
                y_BTNH += self.bias(f"{name}_bias", y_BTNH, (heads, "head_dim"))
            return y_BTNH

        q_BTNH = project("query", "heads")
        k_BTKH = project("key", "kv_heads")
        v_BTKH = project("value", "kv_heads")
        if self.config.qk_norm:
            over_all = self.config.qk_norm_over == "all_heads"
            of_query = ("heads", "head_dim") if over_all else ("head_dim",)
            of_key = ("kv_heads", "head_dim") if over_all else ("head_dim",)
            q_BTNH = self.norm("query_norm", q_BTNH, *of_query)
            k_BTKH = self.norm("key_norm", k_BTKH, *of_key)
        if turn is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, *turn), rotate(k_BTKH, *turn)
        q_BTNH = scaled(q_BTNH, query_factor(self.config))
        if self.config.query_scale is not None:
            q_BTNH *= math.sqrt(self.config.head_dim / self.config.query_scale)
        out_BTNH, left = attend(q_BTNH, k_BTKH, v_BTKH)
        w_NHD = self.weight("out", self.writer("heads", "head_dim"))
        layout = logical("batch", "seq", None)
        y_BTD = contract("BTNH,NHD->BTD", out_BTNH, w_NHD, layout)
        return self.shifted("out_bias", y_BTD, self.config.out_bias), left

    def shifted(self, name: str, y_BTD: jax.Array, has_bias: bool) -> jax.Array:
        """Returns a branch's last product, with its bias if it has one."""
        if not has_bias:
            return y_BTD
        joins = self.config.norm_placement == "before"
        return y_BTD + self.bias(name, y_BTD, ("embed",), joins=joins)

    def mlp(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = self.gated(x_BTD) if self.config.gated else self.ungated(x_BTD)
        w_FD = self.weight("down", self.writer("mlp"))
        y_BTD = contract("BTF,FD->BTD", h_BTF, w_FD, logical("batch", "seq", None))
        return self.shifted("down_bias", y_BTD, self.config.mlp_bias)

    def ungated(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the hidden activations of an MLP without a gate, [B, T, F]."""
        w_DF = self.weight("up", Axes(reads=("embed",), writes=("mlp",)))
        x_BTF = contract(
            "BTD,DF->BTF", x_BTD, w_DF, logical("batch", "seq", "mlp"), MLP_PRODUCT
        )
        if self.config.mlp_bias:
            x_BTF += self.bias("up_bias", x_BTF, ("mlp",))
        return recomputed(UNGATED[self.config.activation])(x_BTF)

    def gated(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the hidden activations of a gated MLP, [B, T, F]."""
        axes = Axes(reads=("embed",), fused=("gate_up",), writes=("mlp",))
        w_DGF = self.weight("gate_up", axes)
        layout = logical("batch", "seq", "mlp")
        gate_BTF, value_BTF = _gate_and_value("BTD,DF->BTF", x_BTD, w_DGF, layout)
        if self.config.mlp_bias:
            bias_1GF = self.bias("gate_up_bias", gate_BTF, ("mlp",), fused=("gate_up",))
            gate_BTF, value_BTF = gate_BTF + bias_1GF[:, :1], value_BTF + bias_1GF[:, 1:]
        return recomputed(GATED[self.config.activation])(gate_BTF, value_BTF)

    def experts(self, x_BTD: jax.Array) -> tuple[jax.Array, Routed]:
        """Returns the experts' output, and the router's statistics."""
        routing = self.config.routing
        assert routing is not None, "a config with experts has a routing"
        w_DE = self.weight("router", Axes(reads=("embed",), writes=("routes",)))
        bias_E = None
        if routing.balance == "bias":
            bias_E = self.choice_bias("router_bias")
        share_BTK, chosen_BTK, routed = route(routing, x_BTD, w_DE, bias_E)
        into = Axes(("experts",), ("embed",), ("expert_mlp",), ("gate_up",))
        w_EDGF = self.weight("expert_gate_up", into)
        w_EFD = self.weight("expert_down", self.writer("expert_mlp", stacked=("experts",)))
        gated = GATED[self.config.activation]
        out_BTD = mixture(x_BTD, share_BTK, chosen_BTK, w_EDGF, w_EFD, gated)
        if self.config.num_shared_experts:
            out_BTD += self.shared(x_BTD)
        return out_BTD, routed

    def shared(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the shared experts' sum: together they are one MLP."""
        axes = Axes((), ("embed",), ("shared_experts", "expert_mlp"), ("gate_up",))
        w_DGSF = self.weight("shared_gate_up", axes)
        layout = logical("batch", "seq", None, "expert_mlp")
        gate_BTSF, value_BTSF = _gate_and_value("BTD,DSF->BTSF", x_BTD, w_DGSF, layout)
        h_BTSF = recomputed(GATED[self.config.activation])(gate_BTSF, value_BTSF)
        w_SFD = self.weight("shared_down", self.writer("shared_experts", "expert_mlp"))
        return contract("BTSF,SFD->BTD", h_BTSF, w_SFD, logical("batch", "seq", None))


def _gate_and_value(
    spec: str, x_BTD: jax.Array, w_DG: jax.Array, layout: P | None
) -> list[jax.Array]:
    """Returns the products with both halves of a fused weight [D, 2, ...]."""
    # Two products avoid a concatenation in the backward pass.
    return [
        contract(spec, x_BTD, jnp.squeeze(half, 1), layout, MLP_PRODUCT)
        for half in jnp.split(w_DG, 2, axis=1)
    ]
