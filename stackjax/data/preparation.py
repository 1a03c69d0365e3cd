"""A preparation under way: the contents of a staging directory, and their identity."""

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from etils import epath

from stackjax.data.config import PrepareConfig
from stackjax.data.manifest import FORMAT
from stackjax.data.parts import Part
from stackjax.files.json_file import decode, hash_of, parse_object, seal, unseal
from stackjax.files.staging import clear_directory
from stackjax.files.storage import replace_text
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer import Tokenizer
from stackjax.tokenizer.tokenizer_info import tokenizer_info

IDENTITY = "preparation.json"
PARTS = "parts"
SCRATCH = "scratch"
TARGET = "set"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Hashes of everything that determines the finished parts."""

    options: str
    tokenizer: str
    inputs: str


def identify(config: PrepareConfig, tokenizer: Tokenizer, parts: list[Part]) -> Identity:
    """Returns the identity of a preparation.

    Refused and skipped rows are no part of it: every finished part records its own.
    """
    inputs = hashlib.sha256()
    for part in parts:
        inputs.update(repr((part.index, part.pieces)).encode("utf-8", "surrogateescape"))
    info = dataclasses.replace(tokenizer_info(tokenizer), name="")
    libraries = [version(name) for name in ("tokenizers", "sentencepiece")]
    return Identity(
        options=hash_of([FORMAT, config.text_field, config.validation_fraction]),
        tokenizer=hash_of([dataclasses.asdict(info), libraries]),
        inputs=inputs.hexdigest(),
    )


def claim(staging: Path, identity: Identity) -> None:
    """Makes a staging directory belong to a preparation.

    Files of another preparation are removed, with a message.
    """
    found = _read_identity(staging)
    if found != identity:
        if found is not None and any((staging / PARTS).glob("*.json")):
            names = [field.name for field in dataclasses.fields(Identity)]
            other = [name for name in names if getattr(found, name) != getattr(identity, name)]
            print(
                f"starting anew: the finished parts in {staging} are of a preparation with "
                f"other {' and '.join(other)}",
                flush=True,
            )
        clear_directory(epath.Path(staging), keep=SCRATCH)
        (staging / PARTS).mkdir()
        text = json.dumps(seal(dataclasses.asdict(identity))) + "\n"
        replace_text(epath.Path(staging / IDENTITY), text)


def _read_identity(staging: Path) -> Identity | None:
    """Returns the identity of the files in a directory; None if absent or damaged."""
    try:
        return decode(Identity, unseal(parse_object((staging / IDENTITY).read_bytes())))
    except (FileNotFoundError, UserError):
        return None
