"""Conversion to and from Hugging Face folders.

Import holds all parameters in memory, export a single parameter.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stackjax import model
from stackjax.checkpoint.contents import Contents
from stackjax.checkpoint.directory import absolute
from stackjax.checkpoint.lineage import total
from stackjax.checkpoint.save import write_first
from stackjax.files.new_directory import new_directory
from stackjax.files.staging import refuse_existing, staging_directory
from stackjax.inference.pretrained import is_folder, open_checkpoint, read_parameter
from stackjax.inference.provenance import (
    carried_files,
    keep_folder,
    own_tokenization,
    trained_seq_len,
)
from stackjax.inference.verify import verify
from stackjax.interop import check_installed, config_json, huggingface
from stackjax.interop.folder import (
    carry,
    new_folder,
    portable_files,
    read_lineage,
    write_folder,
    write_tokenizer,
)
from stackjax.interop.litgpt import read_checkpoint as read_pth
from stackjax.interop.stored_types import read_types, types_of
from stackjax.interop.tensors import DTYPES, TensorInfo, check_finite
from stackjax.model import ModelConfig
from stackjax.model.flops import describe, num_params
from stackjax.options import ConvertConfig
from stackjax.runtime.constraints import check_unset
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short
from stackjax.sharding.mesh import mesh_that_divides
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
        if _is_pth(config.source):
            raise UserError(
                f"transformers cannot run {config.source}, so there is nothing to compare "
                f"with: leave out --verify, and convert the checkpoint to a folder with it."
            )
    _check_unset(config)
    with jax.set_mesh(mesh_that_divides(1)):
        comes_in = is_folder(config.source) or _is_pth(config.source)
        written = from_folder(config) if comes_in else to_folder(config)
        print(f"wrote   {written}")
        if config.verify:
            folder, ours = (config.source, written) if comes_in else (written, config.source)
            print(verify(Path(folder), str(ours), mesh_that_divides(1)))
    return written


def _check_unset(config: ConvertConfig) -> None:
    """Raises UserError for an option without effect on this kind of source."""
    if _is_pth(config.source):
        check_unset(config, ["dtype", "tokenizer"], "SOURCE is a .pth file")
    elif is_folder(config.source):
        check_unset(config, ["dtype", "tokenizer", "head_dim"], "SOURCE is a folder")
    else:
        check_unset(config, ["source_tokens", "head_dim"], "SOURCE is a checkpoint")


def from_folder(config: ConvertConfig) -> epath.Path:
    """Imports a folder or lit-gpt file, with the folder's other files."""
    directory: Any = absolute(config.target)
    refuse_existing(directory)
    path = Path(config.source)
    is_pth = _is_pth(config.source)
    folder = read_pth(path, config.head_dim) if is_pth else huggingface.read_folder(path)
    if not is_pth:
        portable_files(epath.Path(path))
    lineage = read_lineage(folder, config.source_tokens)
    print(f"source  {config.source}: {_sizes(folder.model)}")
    if "F64" in folder.dtypes.values():
        print("note    weights of float64 are rounded to float32")
    params = huggingface.load_params(
        folder, folder.model, mesh_that_divides(1), allow_nonfinite=config.allow_nonfinite
    )
    state = TrainState(jnp.zeros((), jnp.int32), params, None)
    contents = Contents(total(lineage), folder.model, is_model=True, lineage=lineage)
    with new_directory(directory) as staging:
        keep_folder(folder, staging)
        write_first(staging, state, contents)
    return directory / "0"


def to_folder(config: ConvertConfig) -> epath.Path:
    """Exports a checkpoint's model as a Hugging Face folder."""
    target = new_folder(config.target)
    checkpoint, contents = open_checkpoint(config.source)
    print(f"source  {checkpoint}: {_sizes(contents.model)}")
    carried = carried_files(checkpoint)
    template = None if carried is None else config_json.read_fields(carried)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if carried is None else None
    seq_len = trained_seq_len(checkpoint)
    fields = config_json.config_fields(contents.model, dtype, template, seq_len)
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = read_tokenizer(config.tokenizer)
    elif carried is None:
        tokenizer = own_tokenization(checkpoint).tokenizer
    if tokenizer is not None:
        fields["bos_token_id"] = next(iter(tokenizer.begin_ids), None)
        fields["eos_token_id"] = tokenizer.end_id
    stored = {} if carried is None else read_types(carried)
    infos = _infos(contents.model, dtype, stored)
    tensors = _tensors(checkpoint, contents.model, infos, config.allow_nonfinite)
    with staging_directory(target) as staging:
        if tokenizer is not None:
            write_tokenizer(tokenizer, staging)
        elif carried is not None:
            carry(epath.Path(carried), epath.Path(staging))
        write_folder(staging, fields, infos, tensors, contents.lineage)
    return target


def _is_pth(source: str) -> bool:
    return source.endswith(".pth")


def _infos(
    config: ModelConfig, dtype: str | None, stored: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Returns the tensors to write, grouped by parameter.

    Args:
      dtype: Type for all tensors; None uses the types in `stored`.
    """
    kinds = list(model.logical_axes(config)["layers"])
    found = sorted(huggingface.slots(config), key=lambda s: (s.kind in kinds, s.kind))
    names = [slot.name for slot in found]
    if dtype is None:
        types = types_of(names, stored)
    else:
        types = dict.fromkeys(
            names, next(n for n, each in DTYPES.items() if each.name == dtype)
        )
    return {slot.name: TensorInfo(slot.shape(config), types[slot.name]) for slot in found}


def _tensors(
    checkpoint: epath.Path,
    config: ModelConfig,
    infos: Mapping[str, TensorInfo],
    allow_nonfinite: bool,
) -> Iterator[np.ndarray]:
    """Yields a checkpoint's tensors in the order of `infos`.

    Raises:
      UserError: A number is NaN or infinite, possibly only after the cast to float16.
    """
    by_name = {slot.name: slot for slot in huggingface.slots(config)}
    axes = model.logical_axes(config)
    for kind, group in itertools.groupby((by_name[name] for name in infos), lambda s: s.kind):
        path = ("layers", kind) if kind in axes["layers"] else (kind,)
        parameter = np.asarray(read_parameter(checkpoint, config, path, mesh_that_divides(1)))
        for slot in group:
            part = slot.to_tensor(slot.cut(parameter, axes), config)
            with np.errstate(over="ignore"):  # checked below
                tensor = part.astype(DTYPES[infos[slot.name].dtype])
            if not allow_nonfinite:
                check_finite(tensor, slot.name, str(checkpoint))
            yield tensor


def _sizes(config: ModelConfig) -> str:
    return f"{describe(config)}, {short(num_params(config))} parameters"
