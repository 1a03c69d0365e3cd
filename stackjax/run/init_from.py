"""The state when a run starts: new, from a checkpoint, or from other weights."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from stackjax.checkpoint.contents import Contents
from stackjax.checkpoint.directory import absolute
from stackjax.checkpoint.restore import load_whole
from stackjax.checkpoint.save import Checkpoints
from stackjax.config import Config
from stackjax.files.rows_file import NO_ROWS, Extent
from stackjax.inference.pretrained import is_folder, open_checkpoint, read_params
from stackjax.inference.provenance import (
    carried_files,
    data_tokenizer,
    keep_carried,
    keep_folder,
    known_tokenization,
    local_files,
    trained_tokenization,
)
from stackjax.interop import huggingface
from stackjax.interop.folder import CARRIED, portable_files, read_lineage
from stackjax.model import ModelConfig
from stackjax.model.config import differences
from stackjax.run.resume import Position, read_or_go_back
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import build_mesh
from stackjax.tokenizer.special_tokens import read_tokenization
from stackjax.tokenizer.tokenization import Tokenization
from stackjax.training.compile import abstract_state, new_state, phase_optimizer
from stackjax.training.phase import Counts, Phase
from stackjax.training.train_state import TrainState


def check_start(path: str, config: ModelConfig, data_path: str) -> None:
    """Raises UserError if a run cannot start from the parameters at a path.

    The model or the tokenizer may differ from the run's, or a file may be a link out of the
    folder.
    """
    if is_folder(path):
        found = huggingface.read_folder(Path(path)).model
    else:
        found = open_checkpoint(path)[1].model
    # The vocabulary in a folder is not padded, so any padding fits.
    besides = ("vocab_multiple",) if is_folder(path) else ()
    said = differences(config, found, besides=besides)
    if said:
        raise UserError(
            f"init_from {path} holds a different model from stage 0: {said}; take the model "
            f"from there in the config, with stackjax.inference.pretrained.model_of."
        )
    if is_folder(path):
        portable_files(epath.Path(path))
    _check_tokenizer(path, data_path)


def _check_tokenizer(path: str, data_path: str) -> None:
    """Raises UserError if data and model have different tokenizers."""
    source, of_data = _source_tokenization(path), data_tokenizer(data_path)
    if source is None:
        return
    again = f"prepare the data again, with --tokenizer {source.tokenizer.name}"
    # Some folders contain the same tokenizer in two formats.
    other = Path(path) / (of_data.file or "")
    is_other_format = other.is_file() and other.read_bytes() == of_data.definition
    if of_data.digest != source.tokenizer.digest and not is_other_format:
        raise UserError(
            f"init_from {path} has a different tokenizer from the data in {data_path}, "
            f"prepared with {of_data.name}; {again}."
        )
    if of_data.begin_ids != source.begin_ids:
        raise UserError(
            f"the documents in {data_path} begin with the tokens {list(of_data.begin_ids)}, "
            f"and the texts of init_from {path} with {list(source.begin_ids)}; prepare the "
            f"data again, with --tokenizer {path}."
        )


def _source_tokenization(path: str) -> Tokenization | None:
    """Returns the tokenization for the model at a path; None if unknown."""
    if is_folder(path):
        return read_tokenization(Path(path))
    return known_tokenization(open_checkpoint(path)[0])


def run_tokenization(config: Config) -> Tokenization:
    """Returns the tokenization for the run's model, during and after training."""
    carried = _carried(config)
    of_folder = None if carried is None else read_tokenization(carried)
    return trained_tokenization(data_tokenizer(config.data.path), of_folder)


def _carried(config: Config) -> Path | None:
    """Returns the directory with Hugging Face files, if the model comes from Hugging Face."""
    kept = absolute(config.workdir) / CARRIED
    if kept.exists():  # The source folder may be gone.
        return local_files(kept)
    if config.init_from is None:
        return None
    if is_folder(config.init_from):
        return Path(config.init_from)
    return carried_files(open_checkpoint(config.init_from)[0])


def state_at(
    config: Config, workdir: epath.Path, position: Position
) -> tuple[TrainState, Counts, Extent]:
    """Returns the state at a position, the run's counts, and the earlier rows' extent.

    Raises:
      UserError: The checkpoint is damaged or belongs to another run.
    """
    phase, step, mesh = position.phase, position.step, build_mesh(position.phase.mesh)
    if step is None and config.init_from is not None:
        state = start_from(config.init_from, config, workdir, phase, mesh)
        return state, phase.start, NO_ROWS
    if step is None:
        with jax.set_mesh(mesh):
            return new_state(config, phase), phase.start, NO_ROWS
    phases = position.phases[: phase.index + 1]
    of_directory = {workdir / each.directory: each for each in phases}

    def load(checkpoint: epath.Path) -> tuple[TrainState, Contents]:
        of = of_directory[checkpoint.parent]
        mesh = build_mesh(of.mesh)
        with jax.set_mesh(mesh):
            return load_whole(checkpoint, abstract_state(config, of), mesh)

    state, contents = read_or_go_back(workdir, phases, step, load)
    counts = phase.counts(step)
    if step != phase.waypoint.step and counts != contents.counts:
        raise UserError(
            f"{workdir / phase.directory / str(step)} was saved at {contents.counts.tokens:,} "
            f"tokens, but by the config and phase.json this step is at {counts.tokens:,} "
            f"tokens; phase.json is damaged or belongs to another run: restore the right file, "
            f"or start a new run with --workdir."
        )
    return state, counts, contents.rows


def start_from(
    path: str, config: Config, workdir: epath.Path, phase: Phase, mesh: Mesh
) -> TrainState:
    """Returns a run's first state, with parameters from elsewhere.

    State and lineage are saved to disk first, so the run no longer needs the source.
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
