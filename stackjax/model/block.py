"""A decoder layer: attention and SwiGLU on a residual stream.

Shapes: B batch, T time, D embed, N query heads, K key/value heads, H head_dim, F mlp. G is 2:
gate and value of a SwiGLU.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stackjax.model.einsum import MLP_PRODUCT, contract
from stackjax.model.module import Module
from stackjax.model.parametrization import branch_factor, query_factor, scaled
from stackjax.model.rotary import rotate
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import logical
from stackjax.sharding.platform import platform_of, target_device

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""Attention function: (q_BTNH, k_BTKH, v_BTKH) -> (output [B, T, N, H], auxiliary output such
as a KV cache). Queries and keys are already rotated."""


class Block(Module):
    """A pre-norm decoder layer: x + attention(norm(x)), then x + SwiGLU(norm(x)).

    With CompleteP, both branches are multiplied by `branch_factor`.
    """

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, turn: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Returns the residual stream [B, T, D] and the auxiliary output of `attend`."""
        h_BTD = self.norm("attention_norm", x_BTD, "embed")
        read_BTD, left = self.attention(h_BTD, turn, attend)
        x_BTD += scaled(read_BTD, branch_factor(self.config))
        made_BTD = self.mlp(self.norm("mlp_norm", x_BTD, "embed"))
        return x_BTD + scaled(made_BTD, branch_factor(self.config)), left

    def attention(
        self, x_BTD: jax.Array, turn: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
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
            q_BTNH = self.norm("query_norm", q_BTNH, "head_dim")
            k_BTKH = self.norm("key_norm", k_BTKH, "head_dim")
        q_BTNH, k_BTKH = rotate(q_BTNH, *turn), rotate(k_BTKH, *turn)
        q_BTNH = scaled(q_BTNH, query_factor(self.config))
        out_BTNH, left = attend(q_BTNH, k_BTKH, v_BTKH)
        w_NHD = self.weight("out", Axes(reads=("heads", "head_dim"), writes=("embed",)))
        layout = logical("batch", "seq", None)
        return contract("BTNH,NHD->BTD", out_BTNH, w_NHD, layout), left

    def mlp(self, x_BTD: jax.Array) -> jax.Array:
        axes = Axes(reads=("embed",), fused=("gate_up",), writes=("mlp",))
        w_DGF = self.weight("gate_up", axes)
        layout = logical("batch", "seq", "mlp")
        # Two products avoid a concatenation in the backward pass.
        gate_BTF, value_BTF = (
            contract("BTD,DF->BTF", x_BTD, jnp.squeeze(w_D1F, 1), layout, MLP_PRODUCT)
            for w_D1F in jnp.split(w_DGF, 2, axis=1)
        )
        # Recomputing the intermediate arrays is cheaper than storing them. Without the barrier,
        # products compute them from their operands; TPUs then write a third less to memory. On
        # a CPU, where layers are in no loop, the compiler would store them.
        on_cpu = platform_of(target_device()) == "cpu"
        h_BTF = jax.checkpoint(_swiglu, prevent_cse=on_cpu)(gate_BTF, value_BTF)
        w_FD = self.weight("down", Axes(reads=("mlp",), writes=("embed",)))
        return contract("BTF,FD->BTD", h_BTF, w_FD, logical("batch", "seq", None))


def _swiglu(gate_BTF: jax.Array, value_BTF: jax.Array) -> jax.Array:
    """Returns the SwiGLU hidden activations (arXiv:2002.05202)."""
    return nn.silu(gate_BTF) * value_BTF
