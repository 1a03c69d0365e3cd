"""A model that has been trained, ready to be run: its parameters and its tokenizer.

It lies in a run, in a checkpoint, or in a folder of transformers.
"""

import dataclasses
import functools
import operator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from stackjax import model
from stackjax.checkpoint.contents import Contents
from stackjax.checkpoint.directory import absolute, find_checkpoint
from stackjax.checkpoint.lineage import Generation
from stackjax.checkpoint.restore import check_is_model, load_part, read_contents
from stackjax.files.storage import is_remote
from stackjax.inference.provenance import own_tokenization, trained_seq_len
from stackjax.interop import config_json, huggingface
from stackjax.interop.folder import folder_tokenization, read_lineage
from stackjax.model import ModelConfig, Params
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import mesh_that_divides
from stackjax.tokenizer.special_tokens import named_tokenization
from stackjax.tokenizer.tokenization import Tokenization
from stackjax.tokenizer.tokenizer import Tokenizer
from stackjax.training.compile import abstract_part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model, its parameters on a mesh, and its tokenizer."""

    path: str
    """The checkpoint or folder that it lies in."""
    config: ModelConfig
    params: Params
    mesh: Mesh
    tokenization: Tokenization
    seq_len: int
    """Tokens of the longest text that it was trained on."""
    lineage: tuple[Generation, ...]
    """Where it comes from, itself last."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""
        return self.tokenization.tokenizer


def load_pretrained(path: str, tokenizer: str | None = None) -> Pretrained:
    """Returns the model that a path names, over as many devices as divide its channels.

    Args:
      path: A run, a directory of checkpoints, one of them, or a folder of transformers.
      tokenizer: `bytes`, a file, or a folder, instead of the model's own.

    Raises:
      UserError: There is no model, or its tokenizer is not to be found.
    """
    given = None if tokenizer is None else named_tokenization(tokenizer)
    found = _load_folder(Path(path), given) if is_folder(path) else _load_run(path, given)
    if found.tokenizer.vocab_size > found.config.vocab_size:
        raise UserError(
            f"the tokenizer {found.tokenizer.name} has {found.tokenizer.vocab_size} tokens, "
            f"and the model of {path} knows {found.config.vocab_size}; name its own with "
            f"--tokenizer."
        )
    return found


def _load_folder(path: Path, given: Tokenization | None) -> Pretrained:
    folder = huggingface.read_folder(path)
    tokenization = given or folder_tokenization(path)
    mesh = mesh_that_divides(folder.model.embed_dim)
    with jax.set_mesh(mesh):
        params = huggingface.load_params(folder, folder.model, mesh)
    return Pretrained(
        path=str(path),
        config=folder.model,
        params=params,
        mesh=mesh,
        tokenization=tokenization,
        seq_len=config_json.seq_len(folder.fields),
        lineage=read_lineage(folder),
    )


def _load_run(path: str, given: Tokenization | None) -> Pretrained:
    checkpoint, contents = open_checkpoint(path)
    tokenization = given or own_tokenization(checkpoint)
    seq_len = trained_seq_len(checkpoint)
    mesh = mesh_that_divides(contents.model.embed_dim)
    with jax.set_mesh(mesh):
        params = read_params(checkpoint, contents.model, mesh)
    return Pretrained(
        path=str(checkpoint),
        config=contents.model,
        params=params,
        mesh=mesh,
        tokenization=tokenization,
        seq_len=seq_len,
        lineage=contents.lineage,
    )


def model_of(path: str) -> ModelConfig:
    """Returns the model that a path names, for configs that start from it.

    Args:
      path: A folder of transformers; or, in a run of one process, a run, a directory of
        checkpoints, or one of them.
    """
    if is_folder(path):
        # Of several processes none may touch a device before they have met.
        return huggingface.read_folder(Path(path)).model
    return open_checkpoint(path)[1].model


def is_folder(path: str) -> bool:
    """Returns whether a path names a folder of transformers, and not a run of ours."""
    return not is_remote(path) and huggingface.is_folder(Path(path))


def open_checkpoint(path: str) -> tuple[epath.Path, Contents]:
    """Returns the newest checkpoint that a path names; UserError if it holds no model."""
    checkpoint = find_checkpoint(absolute(path))
    contents = read_contents(checkpoint)
    check_is_model(checkpoint, contents)
    return checkpoint, contents


def read_params(checkpoint: epath.Path, config: ModelConfig, mesh: Mesh) -> Params:
    """Returns the parameters in a checkpoint, laid out over the current mesh."""
    whole = abstract_part(config, None, model.logical_axes(config))
    return load_part(checkpoint, whole, mesh).params


def read_parameter(
    checkpoint: epath.Path, config: ModelConfig, path: tuple[str, ...], mesh: Mesh
) -> jax.Array:
    """Returns one parameter in a checkpoint, laid out over the current mesh.

    Args:
      path: Where it is in the tree of parameters.
    """
    axes: Any = functools.reduce(operator.getitem, path, model.logical_axes(config))
    tree = functools.reduce(lambda inner, name: {name: inner}, path[::-1], axes)
    params: Any = load_part(checkpoint, abstract_part(config, None, tree), mesh).params
    return functools.reduce(operator.getitem, path, params)
