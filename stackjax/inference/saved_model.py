"""Models on disk: checkpoints, Hugging Face folders and lit-gpt files."""

import atexit
import dataclasses
import functools
import json
import operator
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from stackjax import model
from stackjax.checkpoint.contents import Contents
from stackjax.checkpoint.directory import absolute, find_checkpoint
from stackjax.checkpoint.lineage import total
from stackjax.checkpoint.restore import check_is_model, load_part, read_contents
from stackjax.config_record import RECORD, read_config_record, recorded_seq_len
from stackjax.files.paths import file_inside
from stackjax.files.storage import is_remote
from stackjax.inference.run_tokenizer import (
    TOKENIZER_DIR,
    merge_tokenization,
    read_run_tokenizer,
    write_run_tokenizer,
)
from stackjax.interop import config_json, huggingface, litgpt
from stackjax.interop.folder import HUGGINGFACE_DIR, copy_portable_files, read_lineage
from stackjax.interop.huggingface import Folder
from stackjax.interop.stored_types import TYPES, write_types
from stackjax.model import ModelConfig, Params
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.special_tokens import read_tokenization
from stackjax.tokenizer.tokenization import Tokenization
from stackjax.training.compile import abstract_part

_LEVELS = 3
"""Parent directories to search above a checkpoint such as RUN/stage_0/train/600."""


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint, with the files next to it: run config, tokenizer, Hugging Face files."""

    path: epath.Path
    contents: Contents

    @property
    def model(self) -> ModelConfig:
        """The model; UserError in the middle of a growth, when parameters are not usable."""
        check_is_model(self.path, self.contents)
        return self.contents.model

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """The run config's fields by command-line name; empty before any training."""
        record = self._find(RECORD)
        return {} if record is None else read_config_record(record)["config"]

    @functools.cached_property
    def huggingface_files(self) -> Path | None:
        """Local directory with the original Hugging Face files, or None."""
        found = self._find(HUGGINGFACE_DIR)
        return None if found is None else local_files(found)

    @functools.cached_property
    def tokenization(self) -> Tokenization | None:
        """Tokenizer and special tokens, or None if unknown."""
        files, own = self.huggingface_files, self._find(TOKENIZER_DIR)
        original = None if files is None else read_tokenization(files)
        return (
            original if own is None else merge_tokenization(read_run_tokenizer(own), original)
        )

    @property
    def seq_len(self) -> int:
        """Longest training sequence, in tokens; UserError if unknown."""
        if self.settings:
            stages = range(self.contents.lineage[-1].stage + 1)
            return max(recorded_seq_len(self.settings, stage) for stage in stages)
        if self.huggingface_files is not None:
            return config_json.seq_len(config_json.read_fields(self.huggingface_files))
        raise UserError(
            f"{self.path} has no {RECORD} and no {HUGGINGFACE_DIR}/ above it, so tokenizer and "
            f"sequence length are unknown; name the checkpoint inside its run."
        )

    def load_params(self, config: ModelConfig, mesh: Mesh) -> Params:
        """Returns the parameters, sharded over the mesh."""
        whole = abstract_part(config, None, model.logical_axes(config))
        return load_part(self.path, whole, mesh).params

    def load_parameter(self, keys: tuple[str, ...], mesh: Mesh) -> jax.Array:
        """Returns a single parameter, sharded over the mesh.

        Args:
          keys: Path in the parameter tree.
        """
        config = self.model
        axes: Any = functools.reduce(operator.getitem, keys, model.logical_axes(config))
        tree = functools.reduce(lambda inner, name: {name: inner}, keys[::-1], axes)
        params: Any = load_part(self.path, abstract_part(config, None, tree), mesh).params
        return functools.reduce(operator.getitem, keys, params)

    def copy_huggingface_files(self, target: epath.Path) -> None:
        """Copies the original Hugging Face files, if any, into a new run or checkpoint."""
        source = self._find(HUGGINGFACE_DIR)
        if source is not None:
            _copy_huggingface_files(source, target / HUGGINGFACE_DIR)

    def copy_files(self, target: epath.Path) -> None:
        """Copies run config, tokenizer and Hugging Face files for a grown checkpoint."""
        record, tokenizer = self._find(RECORD), self._find(TOKENIZER_DIR)
        if record is not None:
            record.copy(target / RECORD)
        if tokenizer is not None:
            write_run_tokenizer(read_run_tokenizer(tokenizer), target / TOKENIZER_DIR)
        self.copy_huggingface_files(target)

    def _find(self, name: str) -> epath.Path | None:
        """Returns the nearest file with this name above the checkpoint, or None."""
        places = [directory / name for directory in list(self.path.parents)[:_LEVELS]]
        return next((place for place in places if place.exists()), None)


@dataclasses.dataclass(frozen=True)
class SavedFolder:
    """A Hugging Face folder, or a lit-gpt file with the interface of a folder."""

    path: Path
    contents: Contents
    folder: Folder

    @property
    def model(self) -> ModelConfig:
        """The model."""
        return self.folder.model

    @property
    def huggingface_files(self) -> Path:
        """Directory with config, tokenizer and license."""
        return self.folder.path

    @functools.cached_property
    def tokenization(self) -> Tokenization | None:
        """Tokenizer and special tokens, or None without a tokenizer."""
        return read_tokenization(self.folder.path)

    @property
    def seq_len(self) -> int:
        """Longest context, in tokens."""
        return config_json.seq_len(self.folder.fields)

    def load_params(
        self, config: ModelConfig, mesh: Mesh, *, allow_nonfinite: bool = False
    ) -> Params:
        """Returns the parameters, sharded over the mesh; see `huggingface.load_params`."""
        return huggingface.load_params(
            self.folder, config, mesh, allow_nonfinite=allow_nonfinite
        )

    def copy_huggingface_files(self, target: epath.Path) -> None:
        """Copies the folder's files into a new run or checkpoint, and records tensor types.

        The copied config says float32 if float64 weights were rounded.
        """
        directory = target / HUGGINGFACE_DIR
        copy_portable_files(epath.Path(self.folder.path), directory)
        fields, types = dict(self.folder.fields), self.folder.dtypes
        if "F64" in types.values():
            fields["dtype" if "dtype" in fields else "torch_dtype"] = "float32"
        (directory / config_json.CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        write_types(types, directory)


SavedModel = SavedCheckpoint | SavedFolder


def open_model(path: str, *, head_dim: int | None = None, source_tokens: int = 0) -> SavedModel:
    """Returns the model at a path, without loading parameters.

    Args:
      path: A run or a directory of checkpoints (the newest is used), a checkpoint, a Hugging
        Face folder, or a lit-gpt `.pth` file.
      head_dim: Channels per head in a lit-gpt file; by default as in the paper's models.
      source_tokens: Training tokens, for a folder without lineage.

    Raises:
      UserError: There is no model, or the model is damaged or unsupported.
    """
    if litgpt.is_litgpt(path):
        folder = litgpt.read_litgpt(Path(path), head_dim)
    elif not is_remote(path) and huggingface.is_folder(Path(path)):
        folder = huggingface.read_folder(Path(path))
    else:
        checkpoint = find_checkpoint(absolute(path))
        return SavedCheckpoint(checkpoint, read_contents(checkpoint))
    lineage = read_lineage(folder, source_tokens)
    contents = Contents(total(lineage), folder.model, is_model=True, lineage=lineage)
    return SavedFolder(Path(path), contents, folder)


def model_of(path: str) -> ModelConfig:
    """Returns the `ModelConfig` stored at a path, for configs with `init_from`.

    Args:
      path: A Hugging Face folder. With a single process also a run, a directory of
        checkpoints, or a checkpoint, because reading one needs JAX devices.
    """
    return open_model(path).model


def local_files(source: epath.Path) -> Path:
    """Returns a local directory with the Hugging Face files.

    Files in a bucket are copied to a temporary directory, which is removed at exit.
    """
    if not is_remote(source):
        return Path(source)
    local = Path(tempfile.mkdtemp(prefix="stackjax-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    _copy_huggingface_files(source, epath.Path(local))
    return local


def _copy_huggingface_files(source: epath.Path, target: epath.Path) -> None:
    copy_portable_files(source, target)
    for name in (config_json.CONFIG, TYPES):
        file_inside(source, name, "a checkpoint").copy(target / name, overwrite=True)
