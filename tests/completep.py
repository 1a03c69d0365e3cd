"""CompleteP in plain numbers: base sizes, and the standard model with the same function."""

import dataclasses

import numpy as np

from stackjax.model.config import CompleteP

# For `tiny_model`: three layers, 16 channels, 20 units, 4 heads of 6 channels.
SIZES = CompleteP(
    base_layers=2,
    base_embed_dim=4,
    base_mlp_dim=10,
    base_heads=2,
    base_kv_heads=1,
    base_head_dim=2,
)


def with_completep(config, completep=SIZES):
    """Returns a model under CompleteP."""
    return dataclasses.replace(config, completep=completep)


def standard(config, params):
    """Returns the standard model with the same function: its config and its parameters."""
    base = config.completep
    branch = base.base_layers / config.depth
    logits = base.base_embed_dim / config.embed_dim
    query = np.sqrt(base.base_head_dim / config.head_dim)
    layers = dict(params["layers"])
    for name in ("out", "down", "out_bias", "down_bias"):
        if name in layers:
            layers[name] = layers[name] * branch
    # Norms remove the scale of their inputs.
    for name in ("query_norm",) if config.qk_norm else ("query", "query_bias"):
        if name in layers:
            layers[name] = layers[name] * query
    last = "final_norm" if config.tie_head else "head"
    plain = dataclasses.replace(config, completep=None)
    scaled = {last: params[last] * logits}
    if config.tie_head and "final_norm_bias" in params:
        scaled["final_norm_bias"] = params["final_norm_bias"] * logits
    return plain, {**params, "layers": layers, **scaled}
