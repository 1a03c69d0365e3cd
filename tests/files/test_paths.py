"""Paths from untrusted files must stay inside the directory."""

import os

import pytest

from stackjax.files.paths import file_inside
from stackjax.runtime.errors import UserError

OUTSIDE = [
    "../secret",
    "/etc/passwd",
    "sub/../../secret",
    "a\0b",
    "a" * 300,
    "",
    ".",
    "a//b",
    5,
    None,
    ["a"],
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_outside_the_directory_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"index\.json names the file"):
        file_inside(tmp_path, name, "index.json")


def test_link_out_of_the_directory_is_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink("../secret", folder / "link")
    with pytest.raises(UserError, match=r"is a link to .*secret, outside"):
        file_inside(folder, "link", "index.json")


def test_links_within_and_to_the_directory_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("text")
    os.symlink("file", tmp_path / "folder" / "inner")
    os.symlink("folder", tmp_path / "outer")
    assert file_inside(tmp_path / "outer", "inner", "index.json").read_text() == "text"


def test_hub_cache_links_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b"
    snapshot.mkdir(parents=True)
    (blobs / "blobs").mkdir()
    (blobs / "blobs" / "9c").write_text("weights")
    os.symlink("../../blobs/9c", snapshot / "model.safetensors")
    found = file_inside(snapshot, "model.safetensors", "index.json")
    assert found.read_text() == "weights"


def test_link_loops_and_special_files_are_refused(tmp_path):
    os.symlink("b", tmp_path / "a")
    os.symlink("a", tmp_path / "b")
    os.symlink("gone", tmp_path / "dangling")
    for name in ("a", "dangling"):
        with pytest.raises(UserError, match="is a broken link"):
            file_inside(tmp_path, name, "index.json")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        with pytest.raises(UserError, match="is not a regular file"):
            file_inside(tmp_path, name, "index.json")


def test_names_in_a_bucket_are_checked_without_requests():
    assert str(file_inside("gs://bucket/set", "a.bin", "m")) == "gs://bucket/set/a.bin"
    with pytest.raises(UserError, match="names the file"):
        file_inside("gs://bucket/set", "../a.bin", "m")
