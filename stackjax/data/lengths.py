"""Document lengths: a file beside each shard with the token count of each document, uint32."""

import hashlib
from pathlib import Path

import numpy as np
from etils import epath

from stackjax.data.manifest import LENGTH_DTYPE, LengthsFile, Shard
from stackjax.runtime.errors import UserError

MAX_LENGTH = np.iinfo(LENGTH_DTYPE).max


class LengthsWriter:
    """Writes document lengths in stream order."""

    def __init__(self, path: Path):
        self._path = path
        self._path.write_bytes(b"")
        self._hash = hashlib.sha256()

    def write(self, lengths: np.ndarray) -> None:
        """Appends the token counts of documents.

        Raises:
          UserError: A document is too long for the file.
        """
        if (longest := lengths.max()) > MAX_LENGTH:
            raise UserError(
                f"a document has {longest} tokens, more than {MAX_LENGTH}; cut it in the input."
            )
        data = lengths.astype(LENGTH_DTYPE).tobytes()
        # Not kept open: a failed writer is never closed.
        with self._path.open("ab") as file:
            file.write(data)
        self._hash.update(data)

    def close(self) -> LengthsFile:
        """Returns the manifest entry."""
        return LengthsFile(
            file=self._path.name,
            bytes=self._path.stat().st_size,
            hash=self._hash.hexdigest(),
        )


def read_lengths(file: epath.Path, shard: Shard, remedy: str) -> np.ndarray:
    """Returns the token count of each document in a shard, uint32 [N].

    Args:
      remedy: Advice for a damaged file, for the error message.

    Raises:
      UserError: The file does not match the manifest.
    """
    data = file.read_bytes()
    lengths = np.frombuffer(data, LENGTH_DTYPE) if len(data) == shard.lengths.bytes else None
    if lengths is None or hashlib.sha256(data).hexdigest() != shard.lengths.hash:
        raise UserError(f"{str(file)!r} has other lengths than in the manifest; {remedy}.")
    if not lengths.all() or lengths.sum(dtype=np.int64) != shard.tokens:
        raise UserError(
            f"the document lengths in {str(file)!r} do not sum to the {shard.tokens} tokens of "
            f"the shard; {remedy}."
        )
    return lengths


def hash_lengths(path: Path) -> str:
    """Returns the hash over all lengths in a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
