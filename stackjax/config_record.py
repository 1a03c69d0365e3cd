"""Config record in a run directory, `config.json`: every field by command-line name."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from stackjax.files.json_file import Fields, dotted, read_object, seal, unseal_if_sealed
from stackjax.runtime.errors import UserError

RECORD = "config.json"
_WAY_OUT = "bring the file back from a copy of the run"


def read_config_record(path: epath.PathLike) -> Fields:
    """Returns the fields `config`, `data` and `tokenizer` in a record.

    Raises:
      UserError: The file is missing or damaged.
    """
    return read_object(path, _WAY_OUT, _check)


def config_record(fields: Fields) -> str:
    """Returns a record as JSON, with a hash."""
    return json.dumps(seal(fields), indent=2) + "\n"


def recorded_seq_len(config: Mapping[str, Any], stage: int) -> Any:
    """Returns a stage's tokens per sequence.

    Args:
      config: The record's fields, by command-line name.
    """
    return config.get(f"stages.{stage}.seq_len") or config["data.seq_len"]


def _check(sealed: Fields) -> Fields:
    # Older records have no hash, and a momentum without effect beside AdamW.
    fields = unseal_if_sealed(sealed)
    for name in fields.keys() - {"config", "data", "tokenizer"}:
        raise UserError(f"{dotted('', name)} is not a known field")
    config = fields.get("config")
    if not isinstance(config, dict) or not config:
        raise UserError("config is missing, or no object")
    if config.get("optimizer.name") == "adamw":
        config.pop("optimizer.momentum", None)
    for name, value in config.items():
        if not _is_plain(value):
            raise UserError(f"{dotted('config', name)} is {str(value)[:60]!r}")
    for name in ("data", "tokenizer"):
        if not isinstance(fields.get(name), str):
            raise UserError(f"{name} is missing, or no text")
    return fields


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, str | int | float) for item in items)
