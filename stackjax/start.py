"""How a run starts from parameters that are there already."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from stackjax.checkpoint import Checkpoints
from stackjax.checkpoint_directory import absolute
from stackjax.compilation import phase_optimizer
from stackjax.config import Config
from stackjax.data.tokenization import Tokenization
from stackjax.errors import UserError
from stackjax.interop import huggingface
from stackjax.interop.folder import CARRIED, portable_files, read_lineage
from stackjax.interop.special_tokens import read_tokenization
from stackjax.model import ModelConfig
from stackjax.model.config import differences
from stackjax.origin import (
    carried_files,
    data_tokenizer,
    keep_carried,
    keep_folder,
    known_tokenization,
    local_files,
    trained_tokenization,
)
from stackjax.phase import Phase
from stackjax.pretrained import is_folder, open_checkpoint, read_params
from stackjax.train_state import TrainState


def check_start(path: str, config: ModelConfig, data_path: str) -> None:
    """Raises UserError if a run cannot start from the parameters at a path.

    They are of another model, or of one that reads texts with another tokenizer than that of
    the data; or a file that goes along is a link out of the folder.
    """
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
    if is_folder(path):
        portable_files(epath.Path(path))
    _check_tokenizer(path, data_path)


def _check_tokenizer(path: str, data_path: str) -> None:
    """Raises UserError if the data was prepared with another tokenizer than the model's."""
    source, of_data = _source_tokenization(path), data_tokenizer(data_path)
    if source is None:
        return
    again = f"prepare the data again, with --tokenizer {source.tokenizer.name}"
    # Some folders have their tokenizer in two formats.
    other = Path(path) / (of_data.file or "")
    is_other_format = other.is_file() and other.read_bytes() == of_data.definition
    if of_data.digest != source.tokenizer.digest and not is_other_format:
        raise UserError(
            f"init_from {path} has another tokenizer than the data in {data_path}, which was "
            f"prepared with {of_data.name}; {again}."
        )
    if of_data.begin_ids != source.begin_ids:
        raise UserError(
            f"the documents in {data_path} begin with the tokens {list(of_data.begin_ids)}, "
            f"and the texts of init_from {path} with {list(source.begin_ids)}; prepare the "
            f"data again, with --tokenizer {path}."
        )


def _source_tokenization(path: str) -> Tokenization | None:
    """Returns how the model at a path reads texts; None if no file says it."""
    if is_folder(path):
        return read_tokenization(Path(path))
    return known_tokenization(open_checkpoint(path)[0])


def run_tokenization(config: Config) -> Tokenization:
    """Returns how the model of a run reads texts, while it trains as afterwards."""
    carried = _carried(config)
    of_folder = None if carried is None else read_tokenization(carried)
    return trained_tokenization(data_tokenizer(config.data.path), of_folder)


def _carried(config: Config) -> Path | None:
    """Returns where the files of another library are, if the model comes from one."""
    kept = absolute(config.workdir) / CARRIED
    if kept.exists():  # The source may be gone by now.
        return local_files(kept)
    if config.init_from is None:
        return None
    if is_folder(config.init_from):
        return Path(config.init_from)
    return carried_files(open_checkpoint(config.init_from)[0])


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
