"""A model that has been trained, ready to be run: its parameters and its tokenizer."""

import dataclasses
import json
import math

import jax
from jax.sharding import Mesh

from stackjax.checkpoint import absolute, find_checkpoint, load_part, read_contents
from stackjax.data.sources import read_manifest
from stackjax.data.tokenizer import Tokenizer, load_tokenizer
from stackjax.grow import abstract_part
from stackjax.model import ModelConfig, Params, logical_axes
from stackjax.sharding import MeshConfig, build_mesh


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


def load_pretrained(path: str, tokenizer: str | None = None) -> Pretrained:
    """Returns the model of a run, or of one of its checkpoints.

    Args:
      tokenizer: By default the one of the data that the run reads.

    Raises:
      ValueError: There is no such model, or nothing tells its tokenizer.
      OSError: A file could not be read.
    """
    checkpoint = find_checkpoint(absolute(path))
    config = read_contents(checkpoint)[0].model
    record = checkpoint.parent.parent.parent / "config.json"
    if not record.exists():
        raise ValueError(f"{checkpoint} is not of a run; name a run.")
    fields = json.loads(record.read_text())["config"]
    name = tokenizer or read_manifest(fields["data.path"]).tokenizer.name
    loaded = load_tokenizer(name)
    devices = jax.local_devices()
    mesh = build_mesh(MeshConfig(), devices[: math.gcd(len(devices), config.embed_dim)])
    with jax.set_mesh(mesh):
        abstract = abstract_part(config, None, logical_axes(config))
        params = load_part(checkpoint, abstract, mesh).params
    return Pretrained(
        config=config,
        params=params,
        mesh=mesh,
        tokenizer=loaded,
        prefix_id=loaded.end_id,
        seq_len=fields["data.seq_len"],
    )
