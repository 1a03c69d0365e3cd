"""Data and runs in a bucket: equality with files on disk, damage and errors."""

import json
import pickle
import shutil
import sys
import time
from pathlib import Path

import folders
import jax
import numpy as np
import pytest
import tensorstore
import zstandard
from conftest import tiny_run
from etils import epath
from fake_gcs import FakeGcs
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from runs import assert_same_run, last_state
from tokenizer_kinds import write_kind

from stackjax import grow, train
from stackjax.checkpoint.directory import absolute, clear, newest_step
from stackjax.data.__main__ import main as data_main
from stackjax.data.cache import local_copy
from stackjax.data.config import DataConfig, PrepareConfig
from stackjax.data.manifest import read_manifest
from stackjax.data.open import open_sources
from stackjax.data.prepare import prepare
from stackjax.data.shards import ShardWriter
from stackjax.data.sources import TokenSource
from stackjax.files.storage import check_bucket, replace_text, replacement
from stackjax.inference.run_tokenizer import copy_data_tokenizer
from stackjax.inference.saved_model import SavedCheckpoint, local_files
from stackjax.interop.stored_types import TYPES
from stackjax.runtime.errors import UserError
from stackjax.training.compile import use_compilation_cache
from stackjax.training.expand import expand
from stackjax.training.run_history import (
    RunHistory,
    after_entering,
    read_history,
    write_history,
)

COMMIT = "orbax.checkpoint._src.path.atomicity:CommitFileTemporaryPath.finalize"
FIRST, SECOND = expand(tiny_run())


@pytest.fixture(scope="module")
def gcs():
    """A bucket server for all clients in this process and child processes."""
    with FakeGcs("bucket", "nameless") as server:
        yield server


def objects(gcs, prefix: str) -> dict[str, bytes]:
    """Returns the objects in the bucket under a prefix."""
    return {
        name.removeprefix(prefix): blob.data
        for name, blob in gcs.objects["bucket"].items()
        if name.startswith(prefix)
    }


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def prepare_corpus(world, output: str) -> None:
    """Prepares the same corpus as `world` in another place."""
    paths = (str(world.path / "text.jsonl"), output)
    prepare(PrepareConfig(paths=paths, tokenizer="bytes", validation_fraction=0.2))


@pytest.fixture(scope="module")
def shards(world, gcs) -> str:
    """The corpus of `world`, in the bucket."""
    prepare_corpus(world, "gs://bucket/data")
    return "gs://bucket/data"


@pytest.mark.parametrize("old", [{}, {"file": b"old"}], ids=["new", "old"])
def test_failed_replacement_leaves_the_directory_as_before(tmp_path, old):
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    path = epath.Path(tmp_path / "file")
    with pytest.raises(OSError, match="full"), replacement(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert files(tmp_path) == old
    replace_text(path, "new")
    assert files(tmp_path) == {"file": b"new"}


def test_one_of_two_writers_of_a_generation_wins(gcs):
    spec = {"driver": "gcs", "bucket": "bucket", "path": "fake/"}
    store = tensorstore.KvStore.open(spec).result()
    first = store.write("key", b"1").result().generation
    assert store.write("key", b"2", if_equal=first).result().generation
    assert not store.write("key", b"3", if_equal=first).result().generation
    assert store.read("key").result().value == b"2"


def test_writes_of_other_hosts_are_visible(gcs):
    directory = epath.Path("gs://bucket/hosts")
    for number in range(100):  # more than a page in a listing
        gcs.put("bucket", f"hosts/{number}", b"")
        if number in (1, 99):
            assert len(list(directory.iterdir())) == number + 1


def test_shards_in_a_bucket_equal_shards_on_disk(world, gcs, shards):
    assert objects(gcs, "data/") == files(world.path / "data")
    for split in ("train", "validation"):
        local = TokenSource(str(world.path / "data"), split, 300)
        remote = pickle.loads(pickle.dumps(TokenSource(shards, split, 300)))
        assert len(remote) == len(local)
        for index in range(0, len(local), 7):
            np.testing.assert_array_equal(remote[index], local[index])


def test_data_set_in_a_bucket_is_shown_as_on_disk(run_main, world, shards):
    local = str(world.path / "data")
    _, expected, _ = run_main(data_main, local, "--compare-with", shards)
    code, out, errors = run_main(data_main, shards, "--compare-with", local)
    assert (code, errors) == (0, "")
    assert "training document" in out and "shared with" in out
    same = [text.split() for text in (out, expected)]
    assert [cell for cell in same[0] if "data" not in cell] == [
        cell for cell in same[1] if "data" not in cell
    ]


def test_interrupted_upload_is_incomplete_and_goes_on(world, gcs, monkeypatch, capsys):
    path_type = type(epath.Path("gs://bucket"))
    copy = path_type.copy

    def fail_at_the_manifest(path, target, overwrite):
        if path.name == "manifest.json":
            raise OSError("connection lost")
        return copy(path, target, overwrite)

    gcs.put("bucket", "cut/.uploading", b"")
    gcs.put("bucket", "cut/train-00000-of-00009.array_record", b"of an upload before")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="connection lost"):
        patch.setattr(path_type, "copy", fail_at_the_manifest)
        prepare_corpus(world, "gs://bucket/cut")
    names = {"train.hashes", "validation.hashes", "inputs.jsonl", ".uploading"}
    assert names < set(objects(gcs, "cut/"))
    gcs.requests.clear()
    with pytest.raises(ValueError, match=r"not a complete set"):
        read_manifest("gs://bucket/cut")
    prepare_corpus(world, "gs://bucket/cut")
    assert "going on: 1 of 1 parts are finished" in capsys.readouterr().out
    uploads = [each for each in gcs.requests if each.startswith("POST /upload")]
    assert all("name=cut/manifest.json" in each for each in uploads)
    assert objects(gcs, "cut/") == files(world.path / "data")
    with pytest.raises(FileExistsError, match=r"'gs://bucket/cut' exists already"):
        prepare_corpus(world, "gs://bucket/cut")


def test_tokenizer_in_a_bucket_is_found(gcs, tmp_path):
    name, inputs = write_kind("unigram", tmp_path), tmp_path / "documents.jsonl"
    inputs.write_text(json.dumps({"text": "a model that grows"}) + "\n")
    paths = (str(inputs), "gs://bucket/kept")
    options = {"validation_fraction": 0.0, "num_processes": 1}
    manifest = prepare(PrepareConfig(paths=paths, tokenizer=name, **options))
    (tmp_path / "tokenizer.json").unlink()
    copy_data_tokenizer("gs://bucket/kept", epath.Path("gs://bucket/keeper"))
    kept = SavedCheckpoint(epath.Path("gs://bucket/keeper/stage_0/train/8"), None).tokenization
    assert kept is not None and kept.tokenizer.digest == manifest.tokenizer.digest
    assert kept.tokenizer.end_id == manifest.tokenizer.end_id


def test_shards_are_copied_once_and_incomplete_copies_again(world, gcs, tmp_path):
    prepare_corpus(world, "gs://bucket/copied")
    config = DataConfig(path="gs://bucket/copied", cache_dir=str(tmp_path), seq_len=300)
    expected = TokenSource(str(world.path / "data"), "train", 300)

    def is_copied() -> bool:
        gcs.requests.clear()
        (source,) = open_sources(config, "train", 256)
        np.testing.assert_array_equal(source[3], expected[3])
        return any("array_record?" in request for request in gcs.requests)

    assert is_copied()
    assert not is_copied()
    (directory,) = tmp_path.iterdir()
    (shard,) = directory.glob("train-*.array_record")
    (directory / f"{shard.name}.unfinished").write_bytes(b"left by a killed process")
    assert not is_copied()
    shard.write_bytes(b"cut")
    assert is_copied()
    # The same data set is uploaded again.
    gcs.put("bucket", "copied/manifest.json", objects(gcs, "copied/")["manifest.json"])
    assert not is_copied()


def test_failed_copy_leaves_no_shard(world, tmp_path, monkeypatch):
    data = shutil.copytree(world.path / "data", tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"take 0\.0 GB"):
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
        local_copy(str(data), "train", str(tmp_path / "full"))
    (shard,) = data.glob("train-*.array_record")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"bytes, not \d+ .*; upload it again"):
        local_copy(str(data), "train", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*/train-*.array_record"))


def test_damaged_copy_is_removed(world, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path_type = type(epath.Path(tmp_path))
    copy = path_type.copy

    def flip_a_bit(path, target, overwrite):
        copy(path, target, overwrite)
        data = bytearray(target.read_bytes())
        data[20_000] ^= 4
        target.write_bytes(data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="is damaged"):
        patch.setattr(path_type, "copy", flip_a_bit)
        local_copy(str(world.path / "data"), "train", str(cache))
    assert not list(cache.glob("*/train-*.array_record"))
    # Another data set with the same shard names and sizes.
    data = shutil.copytree(world.path / "data", tmp_path / "data")
    (shard,) = data.glob("train-*.array_record")
    tokens = TokenSource(str(data), "train", read_manifest(str(data)).splits["train"].tokens)[0]
    writer = ShardWriter(shard, "uint16")
    writer.write(np.roll(tokens, 1))
    writer.close()
    with pytest.raises(OSError, match="has other content"):
        local_copy(str(data), "train", str(cache))
    assert not list(cache.glob("*/train-*.array_record"))
    copied = local_copy(str(world.path / "data"), "train", str(cache))
    np.testing.assert_array_equal(TokenSource(copied, "train", len(tokens))[0], tokens)


def test_marker_in_a_bucket_is_read_and_an_incomplete_phase_is_cleared(gcs):
    workdir = epath.Path("gs://bucket/halves")
    assert read_history(workdir).phase == 0
    write_history(workdir, after_entering(RunHistory(), None, SECOND))
    assert read_history(workdir).phase == SECOND.index
    gcs.put("bucket", f"halves/{SECOND.directory}/10/_CHECKPOINT_METADATA", b"{}")
    assert newest_step(workdir, SECOND) is None
    clear(workdir, SECOND)
    assert list(objects(gcs, "halves/")) == ["phase.json"]


@pytest.fixture(scope="module")
def run(world, uncut, gcs, shards) -> str:
    """A run in the bucket, killed during the second save and resumed."""
    args = world.args("gs://bucket/run", "--data.path", shards, "--logging.tensorboard")

    def start(*signalled: str) -> int:
        code, _, stderr = world.run(args, *signalled)
        lines = stderr.splitlines()  # TensorStore logs the token's origin.
        assert all("GOOGLE_AUTH_TOKEN_FOR_TESTING" in line for line in lines), stderr
        return code

    # The fourth commit belongs to the second checkpoint, after the state.
    assert start("SIGKILL", COMMIT, "before", "4") == -9
    assert "6/state/commit_success.txt" in objects(gcs, "run/stage_0/train/")
    assert newest_step(epath.Path("gs://bucket/run"), FIRST) == 3
    assert start() == 0
    return "gs://bucket/run"


@pytest.mark.slow
def test_resumed_run_in_a_bucket_equals_run_on_disk(uncut, gcs, run, tmp_path):
    for name, data in objects(gcs, "run/").items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert_same_run(tmp_path, uncut)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "phase.json"}
    assert any(b"train/loss" in data for data in files(tmp_path / "tensorboard").values())


@pytest.mark.slow
def test_checkpoint_in_a_bucket_grows_in_the_bucket(uncut, run, run_main):
    target = "gs://bucket/grown/stage_0/train"
    args = (f"{run}/stage_0/train", target, "--growth", "stack(2)")
    assert run_main(grow.main, *args)[0] == 0
    source = last_state(uncut, 0)["params"]
    grown = last_state(epath.Path("gs://bucket/grown"), 0, step=0)["params"]
    for name, leaf in grown["layers"].items():
        np.testing.assert_array_equal(leaf, np.repeat(source["layers"][name], 2, axis=0))
    code, _, error = run_main(grow.main, *args)
    assert code == 2
    assert f"error: output {target!r} exists already" in error


def test_copies_of_hugging_face_files_in_a_bucket_are_removed_at_exit(monkeypatch, tmp_path):
    folder, at_exit = folders.write(tmp_path / "folder", "llama"), []
    (folder / TYPES).write_text("{}")
    monkeypatch.setattr("atexit.register", lambda *call, **options: at_exit.append(call))
    with FakeGcs("bucket") as server:
        for path in folder.iterdir():
            server.put("bucket", f"run/huggingface/{path.name}", path.read_bytes())
        copy = local_files(epath.Path("gs://bucket/run/huggingface"))
    assert copy.joinpath("config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (shutil.rmtree, copy) in at_exit
    shutil.rmtree(copy)


def open_data(path: str) -> TokenSource:
    (source,) = open_sources(DataConfig(path=path, seq_len=8), "train", 256)
    return source


def prepare_from(*paths: str) -> None:
    prepare(PrepareConfig(paths=paths, tokenizer="bytes"))


@pytest.mark.parametrize(
    ("call", "path", "error", "message"),
    [
        (absolute, "gs://nowhere/run", OSError, "gs://nowhere cannot be used: 404 .*no such"),
        (absolute, "gs://forbidden/run", OSError, "gs://forbidden cannot be used: .*list"),
        (absolute, "gs://nameless/run", OSError, "gs://nameless cannot be used: .*metadata"),
        (absolute, "s3://bucket/run", ValueError, "on disks and on gs:// only"),
        (open_data, "gs://nowhere/data", OSError, "bucket gs://nowhere does not exist"),
        (open_data, "gs://bucket/nothing", ValueError, "has no manifest.json"),
        (open_data, "ftp://host/data", ValueError, "is not on a disk and in none of gs://"),
        (open_data, "az://bucket/data", ValueError, "needs `pip install adlfs`"),
        (prepare_from, "gs://nowhere/data", OSError, "bucket gs://nowhere does not exist"),
    ],
)
def test_unusable_bucket_is_named_with_the_reason(
    gcs, tmp_path, monkeypatch, call, path, error, message
):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    args = (path,) if call is not prepare_from else (str(tmp_path), path)
    with pytest.raises(error, match=message) as raised:
        call(*args)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("call", [absolute, check_bucket])
def test_network_failure_is_one_line_within_seconds(monkeypatch, call):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
    start = time.monotonic()
    with pytest.raises(OSError, match=r"gs://bucket cannot be used: localhost is") as e:
        call("gs://bucket/run")
    assert "\n" not in str(e.value)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("call", [absolute, check_bucket])
def test_unknown_scheme_is_one_line(call):
    with pytest.raises(UserError, match=r"foo://bucket/run"):
        call("foo://bucket/run")


def test_bucket_without_permission_is_one_line(world, gcs, run_main):
    code, _, error = run_main(train.main, *world.args("gs://forbidden/run"))
    assert code == 2
    assert error.startswith("error: gs://forbidden cannot be used")


@pytest.fixture
def compilation_cache():
    """Restores JAX's compilation cache after a test."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_enable_xla_caches",
    )
    saved = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    yield
    for name, value in saved.items():
        jax.config.update(name, value)
    reset_cache()


def test_incomplete_and_vanished_cache_entries_are_no_error(tmp_path, compilation_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    whole, cut = tmp_path / "whole-cache", tmp_path / "cut-cache"
    whole.write_bytes(zstandard.compress(b"program"))
    cut.write_bytes(whole.read_bytes()[:-1])
    # A link without a target is listed and cannot be read, like an entry that another run
    # removes in between.
    (tmp_path / "vanished-cache").symlink_to(tmp_path / "nothing")
    use_compilation_cache(epath.Path(tmp_path))
    assert whole.exists() and not cut.exists()


def test_compilation_cache_in_a_bucket_is_used(gcs, compilation_cache):
    use_compilation_cache(epath.Path("gs://bucket/programs"))
    for kept in (0, 1):
        gcs.requests.clear()
        assert jax.jit(lambda x: 3 * x + 7)(5) == 22  # a new function, the same program
        read = [r for r in gcs.requests if "_lambda" in r and r.endswith("alt=media")]
        assert len(read) == kept
        programs = objects(gcs, "programs/compilation_cache/")
        assert sum("_lambda" in name for name in programs) == 1
    # XLA's own cache cannot be in a bucket.
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/cache", "file/cache cannot be used .*JAX_COMPILATION_CACHE_DIR"),
        ("foo://cache", "is not on a disk and in none of"),
    ],
)
def test_unusable_compilation_cache_is_one_line(
    tmp_path, monkeypatch, compilation_cache, place, message
):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_compilation_cache_dir", place)
    with pytest.raises((UserError, OSError), match=message):
        use_compilation_cache(epath.Path(tmp_path))
