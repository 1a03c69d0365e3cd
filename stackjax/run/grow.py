"""Growth outside a run.

Parameters grow one by one. For a checkpoint, memory holds the target and one source parameter;
for a Hugging Face folder, one parameter of source and target.
"""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from stackjax.checkpoint.contents import form_of, saved_optimizer
from stackjax.checkpoint.directory import absolute
from stackjax.checkpoint.grow_state import check_finite, grow_by_parts
from stackjax.checkpoint.lineage import begin_grown
from stackjax.checkpoint.restore import load_part, read_types
from stackjax.checkpoint.save import write_first
from stackjax.config import Config
from stackjax.config_file import read_config
from stackjax.data.open import open_sources
from stackjax.files.new_directory import new_directory
from stackjax.files.staging import refuse_existing, staging_directory
from stackjax.growth import Growth
from stackjax.growth.axis_map import NEW
from stackjax.inference.saved_model import SavedFolder, open_model
from stackjax.interop.folder import copy_portable_files, new_folder, write_folder
from stackjax.interop.grow_folder import grown_infos, grown_tensors
from stackjax.interop.huggingface import grown_fields
from stackjax.model import ModelConfig, Params
from stackjax.model.flops import active, describe, num_params
from stackjax.options import GrowConfig
from stackjax.run.validation import check_num_sequences, check_preserved, validation_loss
from stackjax.runtime.constraints import check_unset
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import largest_mesh
from stackjax.training.train_state import TrainState

_PRESERVED = "keeps the function: same loss, up to rounding"
_EFFECTS = {
    "never": "does not keep the function: the loss jumps, and recovers in training",
    "at_start": _PRESERVED,
    "always": _PRESERVED,
}


def grow(config: GrowConfig) -> epath.Path:
    """Writes the checkpoint or folder of a grown model, and returns the path.

    Raises:
      FileExistsError: TARGET is not empty.
      UserError: SOURCE holds no model, or it cannot grow so.
      OSError: A file could not be read or written.
    """
    saved = open_model(config.source, source_tokens=config.source_tokens)
    if isinstance(saved, SavedFolder):
        return grow_folder(config, saved)
    check_unset(config, ["source_tokens"], "SOURCE is a checkpoint, which knows its own")
    start = time.monotonic()
    directory: Any = absolute(config.target)
    refuse_existing(directory)
    checkpoint, contents = saved.path, saved.contents
    growth, source = config.growth, saved.model
    _check_growth(config, source)
    target = growth.target_config(source)
    optimizer = None
    if config.optimizer_state != "reset":
        optimizer = saved_optimizer(checkpoint, contents, read_types(checkpoint))
    run = None if config.config is None else read_config(config.config)
    print(_plan(str(checkpoint), source, contents.counts.tokens, growth))

    rows = [] if run is None else [run.evaluation.batch_size]
    mesh = largest_mesh(source.embed_dim, target.embed_dim, *rows)
    with jax.set_mesh(mesh):
        before = math.nan
        if run is not None:
            params = saved.load_params(source, mesh)
            before = _held_out_loss(run, source, mesh, params)
            del params
        state = grow_by_parts(
            growth,
            source,
            optimizer,
            functools.partial(_load, config, checkpoint, mesh),
            jax.random.key(config.seed),
            config.optimizer_state,
        )
        if run is not None:
            after = _held_out_loss(run, target, mesh, state.params)
            print(f"loss    held-out {before:.4f} -> {after:.4f}")
            check_preserved(growth, target, before, after)
        lineage = begin_grown(contents.lineage, growth, target)
        form = None if optimizer is None else form_of(optimizer)
        contents = dataclasses.replace(contents, model=target, lineage=lineage, optimizer=form)
        with new_directory(directory) as staging:
            saved.copy_files(staging)
            write_first(staging, state, contents)
    grown = directory / "0"
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    _print_written(grown, num_bytes, start)
    return grown


def _load(
    config: GrowConfig, checkpoint: epath.Path, mesh: Mesh, abstract: TrainState
) -> TrainState:
    """Returns a part of a state; UserError for NaN or infinity, unless allowed."""
    part = load_part(checkpoint, abstract, mesh)
    if not config.allow_nonfinite:
        check_finite(part, str(checkpoint))
    return part


def grow_folder(config: GrowConfig, saved: SavedFolder) -> epath.Path:
    """Writes the folder of a grown model, and returns where; raises as `grow` does."""
    start = time.monotonic()
    directory = new_folder(config.target)
    check_unset(config, ["optimizer_state"], "SOURCE is a folder, without optimizer state")
    folder, growth = saved.folder, config.growth
    _check_growth(config, folder.model)
    target, infos = growth.target_config(folder.model), grown_infos(folder, growth)
    fields = grown_fields(folder, target)
    lineage = begin_grown(saved.contents.lineage, growth, target)
    print(_plan(config.source, folder.model, saved.contents.counts.tokens, growth))
    if config.config is not None:
        print("note    the validation loss of a folder is not measured")
    key = jax.random.key(config.seed)
    tensors = grown_tensors(folder, growth, infos, key, allow_nonfinite=config.allow_nonfinite)
    with staging_directory(directory) as staging:
        copy_portable_files(epath.Path(folder.path), epath.Path(staging))
        write_folder(staging, fields, infos, tensors, lineage)
    _print_written(directory, sum(info.num_bytes for info in infos.values()), start)
    return directory


def _check_growth(config: GrowConfig, source: ModelConfig) -> None:
    """Raises UserError if a growth needs a run."""
    if config.growth.reparameterizations(source):
        raise UserError(
            f"--growth is {config.growth}, with masks that open in training; a checkpoint has "
            f"no masks, so such growth works only inside a run, as the growth of a stage."
        )
    if config.growth.is_fitted and config.optimizer_state != "reset":
        raise UserError(
            f"--optimizer-state is {config.optimizer_state!r}, but {config.growth} has no rule "
            f"for moments; leave --optimizer-state at reset."
        )


def _plan(name: str, source: ModelConfig, tokens: int, growth: Growth) -> str:
    """Returns a summary of source, growth and target."""
    maps = growth.axis_maps(source)
    layers = maps["layers"].sources if "layers" in maps else range(source.num_layers)
    lines = [
        f"source  {name}: {_sizes(source)}, after {tokens:,} tokens",
        f"growth  {growth} {_EFFECTS[growth.preserves_function]}",
        f"layers  {' '.join('new' if layer == NEW else str(layer + 1) for layer in layers)}",
        f"target  {_sizes(growth.target_config(source))}",
    ]
    if growth.is_fitted:
        lines.append("note    the maps have their initial values; only a run fits them")
    return "\n".join(lines)


def _sizes(config: ModelConfig) -> str:
    return f"{describe(config)}, {num_params(config) / 1e6:.3g}M parameters{active(config)}"


def _print_written(path: epath.Path, num_bytes: int, start: float) -> None:
    print(f"wrote   {path}: {num_bytes / 1e6:.4g} MB in {time.monotonic() - start:.1f} s")


def _held_out_loss(run: Config, config: ModelConfig, mesh: Mesh, params: Params) -> float:
    held_out = open_sources(run.data, "validation", config.vocab_size)
    for source in held_out:
        check_num_sequences(run.evaluation, source)
    return validation_loss(run, config, held_out, mesh, params)
