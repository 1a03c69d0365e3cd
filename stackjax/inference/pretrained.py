"""Pretrained models with parameters and tokenizer, from checkpoints or Hugging Face folders."""

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
    """A model with parameters on a mesh and a tokenizer."""

    path: str
    """Checkpoint or folder."""
    config: ModelConfig
    params: Params
    mesh: Mesh
    tokenization: Tokenization
    seq_len: int
    """Longest training sequence, in tokens."""
    lineage: tuple[Generation, ...]
    """Lineage, from the first model to this model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Conversion between text and tokens."""
        return self.tokenization.tokenizer


def load_pretrained(path: str, tokenizer: str | None = None) -> Pretrained:
    """Loads a pretrained model, sharded over as many devices as divide the channels.

    Args:
      path: A run, a directory of checkpoints, a checkpoint, or a Hugging Face folder.
      tokenizer: `bytes`, a file or a folder; by default the model's own tokenizer.

    Raises:
      UserError: There is no model, or no tokenizer.
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
    """Returns the `ModelConfig` stored at a path, for configs with `init_from`.

    Args:
      path: A Hugging Face folder. With a single process also a run, a directory of
        checkpoints, or a checkpoint.
    """
    if is_folder(path):
        # Multi-host: touch no device before all processes are connected.
        return huggingface.read_folder(Path(path)).model
    return open_checkpoint(path)[1].model


def is_folder(path: str) -> bool:
    """Returns whether a path is a Hugging Face folder."""
    return not is_remote(path) and huggingface.is_folder(Path(path))


def open_checkpoint(path: str) -> tuple[epath.Path, Contents]:
    """Returns the newest checkpoint at a path.

    Raises:
      UserError: There is no checkpoint, or the checkpoint has no model.
    """
    checkpoint = find_checkpoint(absolute(path))
    contents = read_contents(checkpoint)
    check_is_model(checkpoint, contents)
    return checkpoint, contents


def read_params(checkpoint: epath.Path, config: ModelConfig, mesh: Mesh) -> Params:
    """Returns a checkpoint's parameters, sharded over the mesh."""
    whole = abstract_part(config, None, model.logical_axes(config))
    return load_part(checkpoint, whole, mesh).params


def read_parameter(
    checkpoint: epath.Path, config: ModelConfig, path: tuple[str, ...], mesh: Mesh
) -> jax.Array:
    """Returns a single parameter from a checkpoint, sharded over the mesh.

    Args:
      path: Keys in the parameter tree.
    """
    axes: Any = functools.reduce(operator.getitem, path, model.logical_axes(config))
    tree = functools.reduce(lambda inner, name: {name: inner}, path[::-1], axes)
    params: Any = load_part(checkpoint, abstract_part(config, None, tree), mesh).params
    return functools.reduce(operator.getitem, path, params)
