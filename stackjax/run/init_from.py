"""The state at the start of a run: new, from a checkpoint, or from weights of elsewhere."""

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


def state_at(
    config: Config, workdir: epath.Path, position: Position
) -> tuple[TrainState, Counts, Extent]:
    """Returns the state at a position, the counts of the run, and its rows up to there.

    Raises:
      UserError: The checkpoint is damaged, or of another run.
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
            f"{workdir / phase.directory / str(step)} says that {contents.counts.tokens:,} "
            f"tokens were trained on, and by the config and phase.json they are "
            f"{counts.tokens:,}; phase.json is damaged, or of another run: bring the right one "
            f"back, or start a new run with --workdir."
        )
    return state, counts, contents.rows


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
