"""Layer contributions to the residual stream.

Shapes: B batch, T time, D embed, L layers that a token passes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stackjax.data.batch import Batch
from stackjax.model.config import ModelConfig
from stackjax.model.layer_kind import LayerKind
from stackjax.model.layer_scan import scan_layers
from stackjax.model.transformer import Params, embed, layer_axes, layer_function


def contributions(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """Returns rms(layer output - layer input) / rms(layer input) for each layer, [L].

    The root mean squares are float32, over channels and tokens of a microbatch [B, T], weighted
    by `loss_weights`. Memory holds the activations of a single layer.
    """
    run_layer = layer_function(config, batch.positions, batch.segments)

    def square(x_BTD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sum(jnp.square(x_BTD), axis=-1) * batch.loss_weights)

    def measure(
        x_BTD: jax.Array, layer: Params, kind: LayerKind
    ) -> tuple[jax.Array, jax.Array]:
        y_BTD, _ = run_layer(x_BTD, layer, kind)
        before_BTD, after_BTD = (x.astype(wide) for x in (x_BTD, y_BTD))
        return y_BTD, jnp.sqrt(square(after_BTD - before_BTD) / square(before_BTD))

    def loop(x_BTD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        def body(kind: LayerKind) -> Any:
            return functools.partial(measure, kind=kind)

        return scan_layers(body, x_BTD, params["layers"], config, axes=layer_axes(config))

    x_BTD = embed(config, params, batch.tokens, batch.positions)
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    return jnp.ravel(jax.lax.scan(loop, x_BTD, length=config.loops)[1])
