"""Files stored next to a checkpoint: run config, tokenizer and Hugging Face files."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from stackjax.config_record import RECORD, read_config_record
from stackjax.data.manifest import MANIFEST, read_manifest
from stackjax.files.json_file import decode, read_object, seal, unseal_if_sealed
from stackjax.files.paths import file_inside
from stackjax.files.storage import is_remote, replace_text
from stackjax.interop import config_json
from stackjax.interop.folder import CARRIED, carry
from stackjax.interop.huggingface import Folder
from stackjax.interop.stored_types import TYPES, write_types
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.special_tokens import read_tokenization
from stackjax.tokenizer.tokenization import Tokenization, tokenization
from stackjax.tokenizer.tokenizer import Tokenizer
from stackjax.tokenizer.tokenizer_info import (
    TokenizerInfo,
    kept_tokenizer,
    tokenizer_info,
    write_file,
)

_TOKENIZER = "tokenizer"
"""Directory in a run with the training data's tokenizer."""
_INFO = "info.json"
_LEVELS = 3
"""Parent directories to search above a checkpoint such as RUN/stage_0/train/600."""


def run_settings(checkpoint: epath.Path) -> Mapping[str, Any]:
    """Returns the training config's fields by command-line name; empty without training."""
    record = _above(checkpoint, RECORD)
    return {} if record is None else read_config_record(record)["config"]


def carried_files(checkpoint: epath.Path) -> Path | None:
    """Returns a local directory with a checkpoint's Hugging Face files, or None."""
    found = _above(checkpoint, CARRIED)
    return None if found is None else local_files(found)


def local_files(carried: epath.Path) -> Path:
    """Returns a local directory with the Hugging Face files, copied if in a bucket."""
    if not is_remote(carried):
        return Path(carried)
    here = Path(tempfile.mkdtemp())
    _copy_carried(carried, epath.Path(here))
    return here


def keep_origin(checkpoint: epath.Path, target: epath.Path) -> None:
    """Copies a checkpoint's config, tokenizer and Hugging Face files for a grown model."""
    record, kept = _above(checkpoint, RECORD), _above(checkpoint, _TOKENIZER)
    if record is not None:
        record.copy(target / RECORD)
    if kept is not None:
        write_kept(read_kept(kept), target / _TOKENIZER)
    keep_carried(checkpoint, target)


def keep_carried(checkpoint: epath.Path, target: epath.Path) -> None:
    """Copies a checkpoint's Hugging Face files."""
    carried = _above(checkpoint, CARRIED)
    if carried is not None:
        _copy_carried(carried, target / CARRIED)


def _copy_carried(carried: epath.Path, target: epath.Path) -> None:
    carry(carried, target)
    for name in (config_json.CONFIG, TYPES):
        file_inside(carried, name, "a checkpoint").copy(target / name, overwrite=True)


def keep_folder(folder: Folder, target: epath.Path) -> None:
    """Copies a folder's files next to a checkpoint, and records all tensor types.

    The copied config says float32 if float64 weights were rounded.
    """
    carry(epath.Path(folder.path), target / CARRIED)
    fields, types = dict(folder.fields), folder.dtypes
    if "F64" in types.values():
        fields["dtype" if "dtype" in fields else "torch_dtype"] = "float32"
    text = json.dumps(fields, indent=2) + "\n"
    (target / CARRIED / config_json.CONFIG).write_text(text)
    write_types(types, target / CARRIED)


def _above(checkpoint: epath.Path, name: str) -> epath.Path | None:
    """Returns the nearest file with a given name above a checkpoint, or None."""
    places = [directory / name for directory in list(checkpoint.parents)[:_LEVELS]]
    return next((place for place in places if place.exists()), None)


def own_tokenization(checkpoint: epath.Path) -> Tokenization:
    """Returns a checkpoint's tokenizer and special tokens.

    Raises:
      UserError: The tokenizer is unknown, missing or damaged.
    """
    found = known_tokenization(checkpoint)
    if found is None:
        raise UserError(f"{checkpoint} does not say its tokenizer; name it with --tokenizer.")
    return found


def known_tokenization(checkpoint: epath.Path) -> Tokenization | None:
    """Returns a checkpoint's tokenizer and special tokens, or None if unknown."""
    kept, carried = _above(checkpoint, _TOKENIZER), carried_files(checkpoint)
    of_folder = None if carried is None else read_tokenization(carried)
    return of_folder if kept is None else trained_tokenization(read_kept(kept), of_folder)


def trained_tokenization(of_data: Tokenizer, of_folder: Tokenization | None) -> Tokenization:
    """Returns a trained model's tokenizer and special tokens.

    Args:
      of_data: The training data's tokenizer, which defines the begin tokens.
      of_folder: The original folder's tokenization, if any: adds end tokens and defines the
        token before a text without context.
    """
    if of_folder is None:
        return tokenization(of_data)
    end_ids = tuple(dict.fromkeys((*of_folder.end_ids, of_data.end_id)))
    return of_folder._replace(tokenizer=of_data, end_ids=end_ids)


def read_kept(directory: epath.Path) -> Tokenizer:
    """Returns the tokenizer stored in a run.

    Raises:
      UserError: A file is missing or damaged.
    """
    file = directory / _INFO
    way_out = "bring it back, or name the tokenizer with --tokenizer"
    info = read_object(
        file, way_out, lambda fields: decode(TokenizerInfo, unseal_if_sealed(fields))
    )
    return kept_tokenizer(directory, info, str(file))


def data_tokenizer(path: str) -> Tokenizer:
    """Returns the tokenizer stored with token shards.

    Raises:
      UserError: The file is missing or was replaced.
    """
    info = read_manifest(path).tokenizer
    return kept_tokenizer(epath.Path(path), info, f"{path}/{MANIFEST}")


def keep_tokenizer(path: str, workdir: epath.Path) -> None:
    """Copies the tokenizer stored with token shards into a run's directory."""
    if jax.process_index() == 0:
        write_kept(data_tokenizer(path), workdir / _TOKENIZER)


def write_kept(tokenizer: Tokenizer, target: epath.Path) -> None:
    """Writes a tokenizer into a run's directory, unless already there."""
    file = target / _INFO
    info = dataclasses.asdict(tokenizer_info(tokenizer))
    text = json.dumps(seal(info), indent=2) + "\n"
    if file.exists() and file.read_text() == text:
        return
    target.mkdir(parents=True, exist_ok=True)
    write_file(tokenizer, target)
    # Written last: marks the tokenizer file as complete.
    replace_text(file, text)


def trained_seq_len(checkpoint: epath.Path) -> int:
    """Returns the longest sequence used to train a checkpoint's model, in tokens.

    Raises:
      UserError: The length is not known.
    """
    settings = run_settings(checkpoint)
    if settings:
        return settings["data.seq_len"]
    carried = carried_files(checkpoint)
    if carried is not None:
        return config_json.seq_len(config_json.read_fields(carried))
    raise UserError(
        f"{checkpoint} does not lie in a run, and came from no folder of transformers, so "
        f"that nothing is known of its tokenizer and of how long its texts were; grow or "
        f"train it where they are."
    )
