"""The tokenizer stored in a run, copied from the training data."""

import dataclasses
import json

import jax
from etils import epath

from stackjax.data.manifest import MANIFEST, read_manifest
from stackjax.files.json_file import decode, read_object, seal, unseal_if_sealed
from stackjax.files.storage import replace_text
from stackjax.tokenizer.tokenization import Tokenization, tokenization
from stackjax.tokenizer.tokenizer import Tokenizer
from stackjax.tokenizer.tokenizer_info import (
    TokenizerInfo,
    stored_tokenizer,
    tokenizer_info,
    write_file,
)

TOKENIZER_DIR = "tokenizer"
"""Directory in a run with the training data's tokenizer."""
_INFO = "info.json"


def merge_tokenization(trained: Tokenizer, original: Tokenization | None) -> Tokenization:
    """Returns a trained model's tokenizer and special tokens.

    Args:
      trained: The training data's tokenizer, which defines the begin tokens.
      original: The original folder's tokenization, if any: adds end tokens and defines the
        token before a text without context.
    """
    if original is None:
        return tokenization(trained)
    end_ids = tuple(dict.fromkeys((*original.end_ids, trained.end_id)))
    return original._replace(tokenizer=trained, end_ids=end_ids)


def data_tokenizer(path: str) -> Tokenizer:
    """Returns the tokenizer stored with token shards.

    Raises:
      UserError: The file is missing or was replaced.
    """
    info = read_manifest(path).tokenizer
    return stored_tokenizer(epath.Path(path), info, f"{path}/{MANIFEST}")


def copy_data_tokenizer(path: str, workdir: epath.Path) -> None:
    """Copies the tokenizer stored with token shards into a run's directory."""
    if jax.process_index() == 0:
        write_run_tokenizer(data_tokenizer(path), workdir / TOKENIZER_DIR)


def read_run_tokenizer(directory: epath.Path) -> Tokenizer:
    """Returns the tokenizer stored in a run.

    Raises:
      UserError: A file is missing or damaged.
    """
    file = directory / _INFO
    way_out = "bring it back, or name the tokenizer with --tokenizer"
    info = read_object(
        file, way_out, lambda fields: decode(TokenizerInfo, unseal_if_sealed(fields))
    )
    return stored_tokenizer(directory, info, str(file))


def write_run_tokenizer(tokenizer: Tokenizer, directory: epath.Path) -> None:
    """Writes a tokenizer into a run's directory, unless already there."""
    file = directory / _INFO
    info = dataclasses.asdict(tokenizer_info(tokenizer))
    text = json.dumps(seal(info), indent=2) + "\n"
    if file.exists() and file.read_text() == text:
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_file(tokenizer, directory)
    # Written last: marks the tokenizer file as complete.
    replace_text(file, text)
