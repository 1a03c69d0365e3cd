"""The tokenizer stored in the directory of a data set or run."""

import dataclasses

from etils import epath

from stackjax.files.paths import file_inside
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The recorded facts about a tokenizer, as in a manifest."""

    name: str
    """`bytes`, or the tokenizer's original path."""
    digest: str
    """`Tokenizer.digest`."""
    vocab_size: int
    """Upper bound of the ids: every id is below."""
    end_id: int
    """The token at the end of each document."""
    begin_ids: tuple[int, ...] = ()
    """The tokens at the beginning of each document."""
    file: str | None = None
    """The tokenizer file in the directory; None for bytes."""


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    """Returns the facts to record about a tokenizer."""
    return TokenizerInfo(
        name=tokenizer.name,
        digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.end_id,
        begin_ids=tokenizer.begin_ids,
        file=tokenizer.file,
    )


def write_file(tokenizer: Tokenizer, directory: epath.Path) -> None:
    """Writes the tokenizer's file into a directory; nothing for bytes."""
    if tokenizer.file is not None and tokenizer.definition is not None:
        (directory / tokenizer.file).write_bytes(tokenizer.definition)


def stored_tokenizer(directory: epath.Path, info: TokenizerInfo, named_by: str) -> Tokenizer:
    """Returns the tokenizer stored in a directory.

    Args:
      named_by: The file with `info` inside, for the error message.

    Raises:
      UserError: The tokenizer file is missing or has changed.
    """
    if info.file is None and info.name != "bytes":
        raise UserError(f"{named_by} names no file of its tokenizer {info.name!r:.60}.")
    file = "bytes" if info.file is None else str(file_inside(directory, info.file, named_by))
    tokenizer = load_tokenizer(file, None if info.file is None else info.end_id)
    if (tokenizer.digest, tokenizer.vocab_size) != (info.digest, info.vocab_size):
        raise UserError(
            f"{file} is not the tokenizer recorded in {named_by}; restore the recorded file, "
            f"or name it with --tokenizer if the command has this option."
        )
    if not all(0 <= index < info.vocab_size for index in info.begin_ids):
        raise UserError(
            f"{named_by} has begin_ids {info.begin_ids!r}; they must be ids of the tokenizer."
        )
    return dataclasses.replace(tokenizer, name=info.name, begin_ids=info.begin_ids)
