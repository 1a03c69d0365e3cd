"""How a run starts from parameters that are there already."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from stackjax.checkpoint import Checkpoints
from stackjax.compilation import phase_optimizer
from stackjax.config import Config
from stackjax.errors import UserError
from stackjax.interop import huggingface
from stackjax.interop.folder import read_lineage
from stackjax.model import ModelConfig
from stackjax.model.config import differences
from stackjax.origin import keep_carried, keep_folder
from stackjax.phase import Phase
from stackjax.pretrained import is_folder, open_checkpoint, read_params
from stackjax.train_state import TrainState


def check_start(path: str, config: ModelConfig) -> None:
    """Raises UserError where the parameters at a path are not those of a model."""
    if is_folder(path):
        found = huggingface.read_folder(Path(path)).model
    else:
        found = open_checkpoint(path)[1].model
    # A folder has no padding of its vocabulary, and so takes any.
    besides = ("vocab_multiple",) if is_folder(path) else ()
    said = differences(config, found, besides=besides)
    if said:
        raise UserError(
            f"init_from {path} holds another model than that of stage 0: {said}; a config may "
            f"take it from there, with stackjax.pretrained.model_of."
        )


def start_from(
    path: str, config: Config, workdir: epath.Path, phase: Phase, mesh: Mesh
) -> TrainState:
    """Returns the first state of a run whose parameters come from elsewhere.

    It is on disk, with the lineage of the model, before it is returned: the run no longer
    needs what it came from.
    """
    with jax.set_mesh(mesh):
        if is_folder(path):
            folder = huggingface.read_folder(Path(path))
            params = huggingface.load_params(folder, phase.model, mesh)
            lineage, keep = read_lineage(folder), functools.partial(keep_folder, folder)
        else:
            checkpoint, contents = open_checkpoint(path)
            params = read_params(checkpoint, phase.model, mesh)
            lineage, keep = contents.lineage, functools.partial(keep_carried, checkpoint)
        if jax.process_index() == 0:
            keep(workdir)
        opt_state = jax.jit(phase_optimizer(config, phase).init)(params)
        state = TrainState(jnp.zeros((), jnp.int32), params, opt_state)
        with Checkpoints(workdir, phase, config.checkpoints, lineage) as checkpoints:
            checkpoints.save(0, state, phase.start)
    return state
