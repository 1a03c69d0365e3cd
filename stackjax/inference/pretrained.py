"""Pretrained models, loaded onto devices."""

import dataclasses

import jax
from jax.sharding import Mesh

from stackjax.inference.saved_model import SavedModel, open_model
from stackjax.model import ModelConfig, Params
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import largest_mesh
from stackjax.tokenizer.special_tokens import TOKENIZER_FILES, tokenization_by_name
from stackjax.tokenizer.tokenization import Tokenization
from stackjax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model with parameters on a mesh and a tokenizer."""

    config: ModelConfig
    params: Params
    mesh: Mesh
    tokenization: Tokenization
    seq_len: int
    """Longest training sequence, in tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Conversion between text and tokens."""
        return self.tokenization.tokenizer


def load_pretrained(path: str, tokenizer: str | None = None) -> Pretrained:
    """Loads a pretrained model, sharded over as many devices as divide the channels.

    Args:
      path: A run or a directory of checkpoints (the newest is used), a checkpoint, a Hugging
        Face folder, or a lit-gpt `.pth` file.
      tokenizer: `bytes`, a file or a folder; by default the model's own tokenizer.

    Raises:
      UserError: There is no model, or no tokenizer.
    """
    return load_saved(open_model(path), tokenizer)


def load_saved(saved: SavedModel, tokenizer: str | None = None) -> Pretrained:
    """Loads a model returned by `open_model`; see `load_pretrained`."""
    config = saved.model
    tokenization = (
        required_tokenization(saved) if tokenizer is None else tokenization_by_name(tokenizer)
    )
    num_tokens = tokenization.tokenizer.vocab_size
    if num_tokens > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenization.tokenizer.name} has {num_tokens} tokens, and the "
            f"model {saved.path} has {config.vocab_size}; name another one with --tokenizer."
        )
    seq_len, mesh = saved.seq_len, largest_mesh(config.embed_dim)
    with jax.set_mesh(mesh):
        params = saved.load_params(config, mesh)
    return Pretrained(
        config=config, params=params, mesh=mesh, tokenization=tokenization, seq_len=seq_len
    )


def required_tokenization(saved: SavedModel) -> Tokenization:
    """Returns a model's own tokenizer and special tokens.

    Raises:
      UserError: The tokenizer is unknown or damaged.
    """
    if saved.tokenization is None:
        raise UserError(
            f"{saved.path} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); name one with "
            f"--tokenizer."
        )
    return saved.tokenization
