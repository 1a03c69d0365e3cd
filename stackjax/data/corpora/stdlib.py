"""The Python standard library's source files, as a TFDS dataset."""

import contextlib
import hashlib
import io
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

VALIDATION_FRACTION = 0.03
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
}


class StackjaxStdlib(tfds.core.GeneratorBasedBuilder):
    """Source files of the installed Python, a corpus without a download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source files of the Python standard library, tests left out.",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "path": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {
            "train": self._generate_examples(held_out=False),
            "validation": self._generate_examples(held_out=True),
        }

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[int, dict[str, str]]]:
        documents = list_documents(Path(sysconfig.get_path("stdlib")))
        chosen = (pair for pair in documents if is_held_out(pair[0]) == held_out)
        for index, (path, text) in enumerate(chosen):
            yield index, {"text": text, "path": path}


def list_documents(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (relative path, text) for each source file, sorted by path.

    Skips installed packages, tests, empty files, and files not in UTF-8.
    """
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        if LEFT_OUT.isdisjoint(name.split("/")) and paths[name].is_file():
            try:
                text = paths[name].read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                yield name, text


def is_held_out(path: str) -> bool:
    """Returns whether a file is in the validation split, a pure function of the path."""
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_FRACTION * 2**64


def build(data_dir: str) -> None:
    """Writes the dataset to a directory, without output; takes seconds.

    Raises:
      OSError: A source file is unreadable, or the disk is full.
    """
    builder = StackjaxStdlib(data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare()
        except RuntimeError as error:  # From ArrayRecord, on a full disk.
            raise OSError(f"cannot write under {data_dir!r}: {error}") from error
