"""What lies around a checkpoint: the config of its run, and the files of another library."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from stackjax.config_record import RECORD, read_config_record
from stackjax.data.manifest import read_manifest
from stackjax.data.tokenizer import Tokenization, Tokenizer, load_tokenizer
from stackjax.errors import UserError
from stackjax.interop import config_json
from stackjax.interop.folder import CARRIED, carry, folder_tokenization
from stackjax.interop.huggingface import Folder
from stackjax.interop.stored_types import TYPES, write_types
from stackjax.storage import is_remote

_LEVELS = 3
"""How far above a checkpoint its run may be: RUN/stage_0/train/600."""


def run_settings(checkpoint: epath.Path) -> Mapping[str, Any]:
    """Returns every field of the config that a checkpoint's model was trained with.

    By its name on the command line; empty where nothing was trained yet.
    """
    record = _above(checkpoint, RECORD)
    return {} if record is None else read_config_record(record)["config"]


def carried_files(checkpoint: epath.Path) -> Path | None:
    """Returns where the files lie that came with a checkpoint's model from another library.

    Those in a bucket are brought here.
    """
    found = _above(checkpoint, CARRIED)
    if found is None or not is_remote(found):
        return None if found is None else Path(found)
    here = Path(tempfile.mkdtemp())
    for file in found.iterdir():
        file.copy(here / file.name)
    return here


def keep_origin(checkpoint: epath.Path, target: epath.Path) -> None:
    """Copies what lies around a checkpoint to where its model goes on as another."""
    record = _above(checkpoint, RECORD)
    if record is not None:
        record.copy(target / RECORD)
    keep_carried(checkpoint, target)


def keep_carried(checkpoint: epath.Path, target: epath.Path) -> None:
    """Copies the files of another library alone, to where a run goes on with the model."""
    carried = _above(checkpoint, CARRIED)
    if carried is not None:
        carry(carried, target / CARRIED)
        for name in (config_json.CONFIG, TYPES):
            (carried / name).copy(target / CARRIED / name, overwrite=True)


def keep_folder(folder: Folder, target: epath.Path) -> None:
    """Copies the files of a folder to where `carried_files` finds them.

    Beside them it writes the type of each tensor. If float64 is rounded, the config says so.
    """
    carry(epath.Path(folder.path), target / CARRIED)
    fields, types = dict(folder.fields), folder.dtypes
    if "F64" in types.values():
        fields["dtype" if "dtype" in fields else "torch_dtype"] = "float32"
    text = json.dumps(fields, indent=2) + "\n"
    (target / CARRIED / config_json.CONFIG).write_text(text)
    write_types(types, target / CARRIED)


def _above(checkpoint: epath.Path, name: str) -> epath.Path | None:
    """Returns the nearest file of a name in a directory above a checkpoint."""
    places = [directory / name for directory in list(checkpoint.parents)[:_LEVELS]]
    return next((place for place in places if place.exists()), None)


def own_tokenization(checkpoint: epath.Path) -> Tokenization:
    """Returns how a checkpoint's model reads texts.

    Raises:
      UserError: It is not known, or is no longer where it was, or another one is.
    """
    carried = carried_files(checkpoint)
    if carried is not None:
        return folder_tokenization(carried)
    settings = run_settings(checkpoint)
    if not settings:
        raise UserError(f"{checkpoint} does not say its tokenizer; name it with --tokenizer.")
    tokenizer = data_tokenizer(settings["data.path"])
    return Tokenization(tokenizer, tokenizer.end_id, is_prefixed=False)


def data_tokenizer(path: str) -> Tokenizer:
    """Returns the tokenizer that a set of token shards was made with.

    Raises:
      UserError: It is no longer where it was, or another one is.
    """
    info = read_manifest(path).tokenizer
    if info.name != "bytes" and not Path(info.name).is_file():
        raise UserError(
            f"the tokenizer of {path} was {info.name}, which is no longer there; bring it "
            f"back, or name it with --tokenizer where that can be given."
        )
    tokenizer = load_tokenizer(info.name, None if info.name == "bytes" else info.end_id)
    if tokenizer.digest != info.digest:
        raise UserError(
            f"{info.name} is another tokenizer than the one that {path} was made with; bring "
            f"that one back, or name it with --tokenizer where that can be given."
        )
    return tokenizer


def trained_seq_len(checkpoint: epath.Path) -> int:
    """Returns the tokens of the longest text that a checkpoint's model was trained on.

    Raises:
      UserError: It is not known.
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
