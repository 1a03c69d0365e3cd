"""A model that has been trained, ready to be run: its parameters and its tokenizer."""

import dataclasses

from jax.sharding import Mesh

from stackjax.data.tokenizer import Tokenizer
from stackjax.model import ModelConfig, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model, its parameters on a mesh, and its tokenizer."""

    config: ModelConfig
    params: Params
    mesh: Mesh
    tokenizer: Tokenizer
    prefix_id: int
    """The token before a text: the one that begins it, or that has ended the one before."""
    seq_len: int
    """Tokens of the longest text that it was trained on."""
