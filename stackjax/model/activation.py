"""Hidden activations of MLPs and experts."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from stackjax.sharding.platform import platform_of, target_device


def recomputed(activation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns the activation with its intermediate arrays recomputed in the backward pass.

    Recomputing is cheaper than storing. Without the barrier, products compute the arrays from
    their operands; TPUs then write a third less to memory. On a CPU, where layers are in no
    loop, the compiler would store them.
    """
    on_cpu = platform_of(target_device()) == "cpu"
    return jax.checkpoint(activation, prevent_cse=on_cpu)


def _swiglu(gate: jax.Array, value: jax.Array) -> jax.Array:
    """Returns the SwiGLU hidden activations (arXiv:2002.05202)."""
    return nn.silu(gate) * value


def _geglu(gate: jax.Array, value: jax.Array) -> jax.Array:
    return nn.gelu(gate, approximate=False) * value


def _geglu_tanh(gate: jax.Array, value: jax.Array) -> jax.Array:
    return nn.gelu(gate, approximate=True) * value


GATED = {"silu": _swiglu, "gelu": _geglu, "gelu_tanh": _geglu_tanh}
"""Hidden activations from gate and value, by `activation`."""
UNGATED = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}
"""Hidden activations of an MLP without a gate, by `activation`."""
