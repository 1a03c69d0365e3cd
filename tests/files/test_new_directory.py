"""Checkpoints written by `grow` and `convert`: complete or absent after any failure."""

import contextlib

import folders
import numpy as np
import pytest
from etils import epath
from fake_gcs import FakeGcs
from orbax.checkpoint import v1 as ocp
from runs import last_state

from stackjax.checkpoint.directory import find_checkpoint
from stackjax.files.new_directory import new_directory
from stackjax.files.staging import UPLOADING
from stackjax.growth import Stack
from stackjax.inference import convert
from stackjax.inference.saved_model import SavedCheckpoint, SavedFolder
from stackjax.options import ConvertConfig, GrowConfig
from stackjax.run import grow

POINTS = {
    "before copying files": ("keep", "before"),
    "after copying files": ("keep", "after"),
    "before the checkpoint": (ocp.training.Checkpointer, "save", "before"),
    "after the checkpoint": (ocp.training.Checkpointer, "save", "after"),
}
FULL_DISK = OSError(28, "No space left on device")


@contextlib.contextmanager
def failing(owner, name, when, error):
    """Raises an error before or after a function call."""
    function = getattr(owner, name)

    def call(*args, **kwargs):
        if when == "after":
            function(*args, **kwargs)
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


def failure(owner, copy_files, point):
    """Returns the failing function's owner and name, and "before" or "after" the call."""
    *checkpointer, name, when = POINTS[point]
    return (*checkpointer, name, when) if checkpointer else (owner, copy_files, when)


@pytest.mark.sample(5)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL_DISK], ids=["killed", "full disk"])
@pytest.mark.parametrize("point", POINTS)
def test_failed_growth_leaves_no_output_and_can_be_repeated(uncut, tmp_path, point, error):
    target = tmp_path / "grown"
    config = GrowConfig(source=str(uncut), target=str(target), growth=Stack(2))
    owner, name, when = failure(SavedCheckpoint, "copy_files", point)
    with failing(owner, name, when, error), pytest.raises((KeyboardInterrupt, OSError)):
        grow.grow(config)
    assert list(tmp_path.iterdir()) == []
    assert grow.grow(config) == epath.Path(target / "0")
    assert {path.name for path in target.iterdir()} == {"0", "config.json", "tokenizer"}


@pytest.mark.sample(3)
@pytest.mark.parametrize("point", POINTS)
def test_failed_conversion_leaves_no_output_and_can_be_repeated(tmp_path, point):
    folder = folders.write(tmp_path / "folder", "llama")
    target = tmp_path / "out" / "converted"
    config = ConvertConfig(source=str(folder), target=str(target))
    owner, name, when = failure(SavedFolder, "copy_huggingface_files", point)
    with failing(owner, name, when, FULL_DISK), pytest.raises(OSError, match="No space left"):
        convert.convert(config)
    assert list(target.parent.iterdir()) == []
    assert convert.convert(config) == epath.Path(target / "0")
    assert {path.name for path in target.iterdir()} == {"0", "huggingface"}


@pytest.mark.slow
def test_killed_upload_is_incomplete_and_can_be_repeated(uncut):
    target = "gs://bucket/grown/stage_0/train"
    config = GrowConfig(source=str(uncut), target=target, growth=Stack(2))
    with FakeGcs("bucket") as server:
        for point in POINTS:
            owner, name, when = failure(SavedCheckpoint, "copy_files", point)
            with (
                failing(owner, name, when, KeyboardInterrupt()),
                pytest.raises(KeyboardInterrupt),
            ):
                grow.grow(config)
            names = server.objects["bucket"]
            assert f"grown/stage_0/train/{UPLOADING}" in names
            if point != "after the checkpoint":
                with pytest.raises(ValueError, match="there is no checkpoint in"):
                    find_checkpoint(epath.Path(target))
        grow.grow(config)
        assert not any(UPLOADING in name for name in server.objects["bucket"])
        assert "grown/stage_0/train/config.json" in server.objects["bucket"]
        grown = last_state(epath.Path("gs://bucket/grown"), 0, step=0)["params"]
        with pytest.raises(FileExistsError, match="exists already"):
            grow.grow(config)
    source = last_state(uncut, 1)["params"]
    expected = np.concatenate(2 * [source["layers"]["query"]])
    np.testing.assert_array_equal(grown["layers"]["query"], expected)


def test_leftovers_in_a_bucket_are_removed():
    with FakeGcs("bucket") as server:
        for name in (UPLOADING, "left.json", "0/half"):
            server.put("bucket", f"target/{name}", b"")
        with new_directory(epath.Path("gs://bucket/target")) as directory:
            (directory / "whole").write_text("whole")
        assert set(server.objects["bucket"]) == {"target/whole"}
