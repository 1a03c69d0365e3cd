"""The state when a run starts: new, from a checkpoint, or from other weights."""

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
from stackjax.inference.run_tokenizer import data_tokenizer, merge_tokenization
from stackjax.inference.saved_model import SavedFolder, local_files, open_model
from stackjax.interop.folder import HUGGINGFACE_DIR, portable_files
from stackjax.model import ModelConfig
from stackjax.model.config import differences
from stackjax.run.resume import Position, read_or_go_back
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import build_mesh
from stackjax.tokenizer.special_tokens import read_tokenization
from stackjax.tokenizer.tokenization import Tokenization
from stackjax.training.compile import abstract_state, new_state, phase_optimizer
from stackjax.training.phase import Counts, Phase
from stackjax.training.spikes import SpikeStatistics
from stackjax.training.train_state import TrainState


def check_start(path: str, config: ModelConfig, data_path: str) -> None:
    """Raises UserError if a run cannot start from the parameters at a path.

    The model or the tokenizer may differ from the run's, or a file may be a link out of the
    folder.
    """
    source = open_model(path)
    # The vocabulary in a folder is not padded, so any padding fits.
    besides = ("vocab_multiple",) if isinstance(source, SavedFolder) else ()
    differing = differences(config, source.model, besides=besides)
    if differing:
        raise UserError(
            f"init_from {path} holds a different model from stage 0: {differing}; take the "
            f"model from there in the config, with "
            f"stackjax.inference.saved_model.model_of."
        )
    if source.huggingface_files is not None:
        portable_files(epath.Path(source.huggingface_files))
    if source.tokenization is not None:
        _check_tokenizer(path, source.tokenization, data_path)


def _check_tokenizer(path: str, source: Tokenization, data_path: str) -> None:
    """Raises UserError if data and model have different tokenizers."""
    of_data = data_tokenizer(data_path)
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


def run_tokenization(config: Config) -> Tokenization:
    """Returns the tokenization for the run's model, during and after training."""
    files = _huggingface_files(config)
    original = None if files is None else read_tokenization(files)
    return merge_tokenization(data_tokenizer(config.data.all_sources[0].path), original)


def _huggingface_files(config: Config) -> Path | None:
    """Returns a local directory with the source model's Hugging Face files, if any."""
    copied = absolute(config.workdir) / HUGGINGFACE_DIR
    if copied.exists():  # The source may have been removed since.
        return local_files(copied)
    return None if config.init_from is None else open_model(config.init_from).huggingface_files


def state_at(
    config: Config, workdir: epath.Path, position: Position
) -> tuple[TrainState, Counts, Extent, SpikeStatistics | None]:
    """Returns a position's state, counts, earlier rows' extent, and statistics for spikes.

    Raises:
      UserError: The checkpoint is damaged or belongs to another run.
    """
    phase, step, mesh = position.phase, position.step, build_mesh(position.phase.mesh)
    if step is None and config.init_from is not None:
        state = start_from(config.init_from, config, workdir, phase, mesh)
        return state, phase.start, NO_ROWS, None
    if step is None:
        with jax.set_mesh(mesh):
            return new_state(config, phase), phase.start, NO_ROWS, None
    phases = position.phases[: phase.index + 1]
    of_directory = {workdir / each.directory: each for each in phases}

    def load(checkpoint: epath.Path) -> tuple[TrainState, Contents]:
        of = of_directory[checkpoint.parent]
        mesh = build_mesh(of.mesh)
        with jax.set_mesh(mesh):
            return load_whole(checkpoint, abstract_state(of), mesh)

    state, contents = read_or_go_back(workdir, phases, step, load)
    counts = phase.counts(step)
    if step != phase.waypoint.step and counts != contents.counts:
        raise UserError(
            f"{workdir / phase.directory / str(step)} was saved at {contents.counts.tokens:,} "
            f"tokens, but by the config and phase.json this step is at {counts.tokens:,} "
            f"tokens; phase.json is damaged or belongs to another run: restore the right file, "
            f"or start a new run with --workdir."
        )
    return state, counts, contents.rows, contents.spikes


def start_from(
    path: str, config: Config, workdir: epath.Path, phase: Phase, mesh: Mesh
) -> TrainState:
    """Returns a run's first state, with parameters from elsewhere.

    State and lineage are saved to disk first, so the run no longer needs the source.
    """
    with jax.set_mesh(mesh):
        source = open_model(path)
        params = source.load_params(phase.model, mesh)
        if jax.process_index() == 0:
            source.copy_huggingface_files(workdir)
        opt_state = jax.jit(phase_optimizer(phase).init)(params)
        state = TrainState(jnp.zeros((), jnp.int32), params, opt_state)
        with Checkpoints(
            workdir, phase, config.checkpoints, source.contents.lineage
        ) as checkpoints:
            checkpoints.save(0, state, phase.start)
    return state
