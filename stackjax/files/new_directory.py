"""New output directories on a disk or in a bucket."""

import contextlib
from collections.abc import Iterator

from etils import epath

from stackjax.files.staging import (
    UPLOADING,
    clear_directory,
    refuse_existing,
    staging_directory,
)
from stackjax.files.storage import is_remote


@contextlib.contextmanager
def new_directory(output: epath.Path) -> Iterator[epath.Path]:
    """Yields an empty directory; after the block, `output` has the files written there.

    On a disk the output is complete or absent. In a bucket the block writes directly to the
    output and must write the checkpoint last: an output without a checkpoint counts as absent.
    After a kill, the same command starts again from nothing.

    Raises:
      FileExistsError: The output exists and is not an empty directory.
    """
    if not is_remote(output):
        with staging_directory(output) as staging:
            yield epath.Path(staging)
        return
    refuse_existing(output)
    marker = output / UPLOADING
    marker.write_text("Incomplete: the writer is running or was killed.\n")
    clear_directory(output, keep=UPLOADING)
    yield output
    marker.unlink()
