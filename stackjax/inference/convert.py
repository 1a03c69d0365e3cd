"""Conversion to and from Hugging Face folders.

Import holds all parameters in memory, export a single parameter.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stackjax import model
from stackjax.checkpoint.directory import absolute
from stackjax.checkpoint.save import write_first
from stackjax.files.new_directory import new_directory
from stackjax.files.staging import refuse_existing, staging_directory
from stackjax.inference.pretrained import required_tokenization
from stackjax.inference.saved_model import (
    SavedCheckpoint,
    SavedFolder,
    SavedModel,
    open_model,
)
from stackjax.inference.verify import verify
from stackjax.interop import check_installed, config_json
from stackjax.interop.folder import (
    copy_portable_files,
    new_folder,
    portable_files,
    write_folder,
    write_tokenizer,
)
from stackjax.interop.litgpt import is_litgpt
from stackjax.interop.slots import kinds_of, slot_groups, to_tensors
from stackjax.interop.stored_types import read_types, types_of
from stackjax.interop.tensors import DTYPES, TensorInfo
from stackjax.model import ModelConfig
from stackjax.model.config import untied
from stackjax.model.flops import active, describe, num_params
from stackjax.model.parametrization import fold_factor
from stackjax.options import ConvertConfig
from stackjax.runtime.constraints import check_unset
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short
from stackjax.sharding.mesh import largest_mesh
from stackjax.tokenizer.special_tokens import read_tokenizer
from stackjax.training.train_state import TrainState


def convert(config: ConvertConfig) -> epath.Path:
    """Imports or exports a model and returns the path of the new checkpoint or folder.

    Raises:
      FileExistsError: TARGET is not empty.
      UserError: SOURCE is no model, or the other library cannot represent the model.
      OSError: A file could not be read or written.
    """
    if config.verify:
        check_installed("torch", "transformers")
        if is_litgpt(config.source):
            raise UserError(
                f"verify is set and SOURCE {config.source} is a lit-gpt file, which "
                f"transformers cannot run; convert without --verify, and convert the "
                f"checkpoint to a folder with --verify."
            )
    source = open_model(
        config.source, head_dim=config.head_dim, source_tokens=config.source_tokens
    )
    _check_unset(config, source)
    print(f"source  {source.path}: {_sizes(source.model)}")
    with jax.set_mesh(largest_mesh(1)):
        if isinstance(source, SavedFolder):
            written = import_model(config, source)
            folder, checkpoint = source.path, written
        else:
            written = export_model(config, source)
            folder, checkpoint = written, source.path
        print(f"wrote   {written}")
        if config.verify:
            print(verify(Path(folder), str(checkpoint), largest_mesh(1)))
    return written


def _check_unset(config: ConvertConfig, source: SavedModel) -> None:
    """Raises UserError for an option without effect on this kind of source."""
    if is_litgpt(config.source):
        check_unset(config, ["dtype", "tokenizer"], "SOURCE is a .pth file")
    elif isinstance(source, SavedFolder):
        check_unset(config, ["dtype", "tokenizer", "head_dim"], "SOURCE is a folder")
    else:
        check_unset(config, ["source_tokens", "head_dim"], "SOURCE is a checkpoint")


def import_model(config: ConvertConfig, source: SavedFolder) -> epath.Path:
    """Writes a folder's model as a checkpoint, with the folder's other files."""
    directory: Any = absolute(config.target)
    refuse_existing(directory)
    portable_files(epath.Path(source.huggingface_files))
    if "F64" in source.folder.dtypes.values():
        print("note    float64 weights are rounded to float32")
    params = source.load_params(
        source.model, largest_mesh(1), allow_nonfinite=config.allow_nonfinite
    )
    with new_directory(directory) as staging:
        source.copy_huggingface_files(staging)
        state = TrainState(jnp.zeros((), jnp.int32), params, None)
        write_first(staging, state, source.contents)
    return directory / "0"


def export_model(config: ConvertConfig, source: SavedCheckpoint) -> epath.Path:
    """Writes a checkpoint's model as a Hugging Face folder, with a layer for each loop."""
    target = new_folder(config.target)
    files, dtype = source.huggingface_files, config.dtype
    template = None if files is None else config_json.read_fields(files)
    if dtype == "auto":
        dtype = "float32" if files is None else None
    # The factors of CompleteP are in the tensors.
    plain = dataclasses.replace(untied(source.model), completep=None)
    fields = config_json.config_fields(plain, dtype, template, source.seq_len)
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = read_tokenizer(config.tokenizer)
    elif files is None:
        tokenizer = required_tokenization(source).tokenizer
    if tokenizer is not None:
        fields["bos_token_id"] = next(iter(tokenizer.begin_ids), None)
        fields["eos_token_id"] = tokenizer.end_id
    kind: str = fields["model_type"]
    types = {} if files is None else read_types(files)
    infos = _infos(untied(source.model), kind, dtype, types)
    tensors = _tensors(source, kind, infos, config.allow_nonfinite)
    with staging_directory(target) as staging:
        if tokenizer is not None:
            write_tokenizer(tokenizer, staging)
        elif files is not None:
            copy_portable_files(epath.Path(files), epath.Path(staging))
        write_folder(staging, fields, infos, tensors, source.contents.lineage)
    return target


def _infos(
    config: ModelConfig, model_type: str, dtype: str | None, stored: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Returns the tensors to write, grouped by parameter.

    Args:
      dtype: Type for all tensors; None uses the types in `stored`.
    """
    found = list(itertools.chain(*slot_groups(config, model_type)))
    names = [slot.name for slot in found]
    if dtype is None:
        types = types_of(names, stored)
    else:
        types = dict.fromkeys(
            names, next(n for n, each in DTYPES.items() if each.name == dtype)
        )
    return {slot.name: TensorInfo(slot.shape(config), types[slot.name]) for slot in found}


def _tensors(
    source: SavedCheckpoint,
    model_type: str,
    infos: Mapping[str, TensorInfo],
    allow_nonfinite: bool,
) -> Iterator[np.ndarray]:
    """Yields a checkpoint's tensors in the order of `infos`.

    Raises:
      UserError: A number is NaN or infinite, possibly only after the cast to float16.
    """
    config = untied(source.model)
    where = None if allow_nonfinite else str(source.path)
    for group in slot_groups(config, model_type):
        in_layers = group[0].layer is not None
        parameters = {kind: _parameter(source, kind, in_layers) for kind in kinds_of(group)}
        yield from to_tensors(parameters, group, config, infos, where)


def _parameter(source: SavedCheckpoint, kind: str, in_layers: bool) -> np.ndarray:
    """Returns a parameter without the factors of CompleteP, with a layer for each loop."""
    axes, loops = model.logical_axes(source.model), source.model.loops
    keys = ("layers", kind) if in_layers else (kind,)
    parameter = np.asarray(source.load_parameter(keys, largest_mesh(1)))
    names = axes["layers"][kind] if in_layers else axes[kind]
    factor = fold_factor(untied(source.model), names)
    if factor != 1:
        parameter = np.float32(factor) * parameter
    return np.concatenate([parameter] * loops) if loops > 1 and in_layers else parameter


def _sizes(config: ModelConfig) -> str:
    return f"{describe(config)}, {short(num_params(config))} parameters{active(config)}"
