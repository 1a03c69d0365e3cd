from stackjax.model.config import ModelConfig
from stackjax.model.layer_contributions import contributions
from stackjax.model.loss import LossSums, next_token_loss
from stackjax.model.transformer import LayerSpan, Params, apply, init, logical_axes

__all__ = [
    "LayerSpan",
    "LossSums",
    "ModelConfig",
    "Params",
    "apply",
    "contributions",
    "init",
    "logical_axes",
    "next_token_loss",
]
