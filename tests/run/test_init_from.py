"""Runs that start from a Hugging Face folder or a checkpoint."""

import dataclasses
import shutil

import folders
import jax
import numpy as np
import pytest
from etils import epath
from runs import last_state, rarely_saved

from stackjax.checkpoint.directory import find_checkpoint
from stackjax.checkpoint.restore import read_contents
from stackjax.config import Stage
from stackjax.inference.convert import convert
from stackjax.inference.pretrained import load_pretrained
from stackjax.inference.saved_model import SavedFolder, model_of, open_model
from stackjax.interop.huggingface import load_params, read_folder
from stackjax.options import ConvertConfig
from stackjax.run import train


def config_from(world, path, workdir, **changes):
    """A run that starts from a model and doubles the depth."""
    config = world.config(workdir=workdir)
    start = {"model": model_of(str(path)), "model_is": "source", "init_from": str(path)}
    return rarely_saved(dataclasses.replace(config, **start | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # The model of the other runs, so that they share their programs.
    sizes = {"vocab_size": 256, "num_hidden_layers": 1, "intermediate_size": 32}
    path = tmp_path_factory.mktemp("start") / "llama"
    folders.write(path, "llama", **sizes, rms_norm_eps=1e-5)
    (path / "LICENSE").write_text("free")
    return path


@pytest.fixture(scope="module")
def started(world, folder, tmp_path_factory):
    """Directory and config of a run started from a folder; the folder is deleted."""
    path = tmp_path_factory.mktemp("started")
    config = config_from(world, shutil.copytree(folder, path / "folder"), path / "run")
    train.train(config)
    shutil.rmtree(path / "folder")
    return path / "run", config


def test_run_starts_from_folder(folder, started):
    workdir, _ = started
    mesh = jax.make_mesh((1, 1, 1), ("replica", "fsdp", "tensor"))
    source = read_folder(folder)
    with jax.set_mesh(mesh):
        expected = jax.tree.map(np.asarray, load_params(source, source.model, mesh))
    first = last_state(workdir, 0, step=0)
    jax.tree.map(np.testing.assert_array_equal, first["params"], expected)
    assert (first["step"], first["opt_state"][1]["count"]) == (0, 0)
    assert not first["opt_state"][1]["mu"]["head"].any()


def test_run_continues_lineage_of_folder(started):
    contents = read_contents(find_checkpoint(epath.Path(started[0])))
    assert [generation.growth for generation in contents.lineage] == [None, None, "stack(2)"]
    assert contents.lineage[0].code == "from folder"
    assert contents.counts.tokens == 2 * 8 * 128


def test_files_of_folder_outlive_folder(started, tmp_path):
    workdir, config = started
    train.train(config)
    convert(ConvertConfig(source=str(workdir), target=str(tmp_path / "grown")))
    assert (tmp_path / "grown" / "LICENSE").read_text() == "free"
    assert read_folder(tmp_path / "grown").model.num_layers == 2


@pytest.mark.slow
def test_run_from_checkpoint_continues_lineage(world, uncut, tmp_path):
    config = config_from(world, uncut, tmp_path / "run")
    train.train(config)
    first, last = last_state(tmp_path / "run", 0, step=0), last_state(uncut, 1)
    jax.tree.map(np.testing.assert_array_equal, first["params"], last["params"])
    contents = read_contents(find_checkpoint(epath.Path(tmp_path / "run")))
    growths = [generation.growth for generation in contents.lineage]
    assert growths == [None, "stack(2)", None, "stack(2)"]
    pretrained = load_pretrained(str(tmp_path / "run"))
    assert (pretrained.tokenizer.name, pretrained.seq_len) == ("bytes", 16)


@pytest.mark.slow
def test_run_killed_before_first_save_starts_again(
    world, folder, started, tmp_path, monkeypatch
):
    config = config_from(world, folder, tmp_path / "run")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SavedFolder, "copy_huggingface_files", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
    train.train(config)
    found, expected = (last_state(path, 1) for path in (tmp_path / "run", started[0]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_different_model_is_refused_by_field(world, folder, tmp_path):
    config = config_from(world, folder, tmp_path / "run")
    wider = dataclasses.replace(config.model, mlp_dim=24, rope_theta=5.0)
    with pytest.raises(ValueError) as error:
        train.train(dataclasses.replace(config, model=wider))
    assert "model.mlp_dim is 24, not 32, model.rope_theta is 5.0, not 10000.0" in str(
        error.value
    )
    assert not (tmp_path / "run").exists()


def test_damaged_folder_is_refused_without_side_effects(world, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "folder")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        train.train(config_from(world, copy, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_missing_source_is_refused(world, tmp_path):
    config = world.config("--init-from", "nowhere", workdir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*nowhere"):
        train.train(config)


def test_init_from_cannot_change_on_resume(started, uncut):
    _, config = started
    with pytest.raises(ValueError, match=r"init_from: "):
        train.train(dataclasses.replace(config, init_from=str(uncut)))


def test_first_stage_may_have_its_own_positions(world, folder, tmp_path):
    stage = Stage(tokens=256, batch_size=8, seq_len=32, rope_theta=5e4)
    config = config_from(world, folder, tmp_path / "run", stages=(stage,))
    train.train(config)
    saved = open_model(str(tmp_path / "run"))
    assert (config.model.rope_theta, saved.model.rope_theta, saved.seq_len) == (1e4, 5e4, 32)
