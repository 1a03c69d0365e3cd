"""The grow command, and growth one parameter at a time."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GROWTHS, MODELS, mesh_of, phase_of, random_params, tiny_model
from etils import epath
from runs import last_state, rows

from stackjax import grow as command
from stackjax import model
from stackjax.checkpoint.directory import find_checkpoint
from stackjax.checkpoint.grow_state import grow_by_parts
from stackjax.checkpoint.restore import load_whole, read_contents
from stackjax.checkpoint.save import Checkpoints
from stackjax.config import CheckpointConfig
from stackjax.growth import DepthRandom, Learn, Stack
from stackjax.optimizers import AdamW, Muon
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import abstract_part
from stackjax.training.phase import Counts
from stackjax.training.train_state import TrainState, grow_state, init_state

KEY = jax.random.key(0)
ADAMW = AdamW(peak_learning_rate=1e-2)
MUON = Muon(peak_learning_rate=1e-2)
BFLOAT16 = dataclasses.replace(MUON, moments_dtype="bfloat16")


def by_path(tree):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    expected = by_path(other)
    for path, leaf in by_path(tree).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def state_of(config, optimizer) -> TrainState:
    """Returns a state with distinct moments."""
    params, rng = random_params(config), np.random.default_rng(1)
    tx = optimizer.build(model.logical_axes(config))
    opt_state = jax.tree.map(
        lambda leaf: rng.uniform(1, 2, leaf.shape).astype(leaf.dtype),
        jax.eval_shape(tx.init, params),
    )
    return TrainState(jnp.int32(4), params, opt_state)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "optimizer", "moments", "on"),
    [
        ("stack", MUON, "keep", "fsdp 8"),
        ("split, uneven", BFLOAT16, "grow", "fsdp 8"),
        ("depth zero, stacked, fresh", None, "reset", "one device"),
        ("chain with noise", ADAMW, "grow", "one device"),
        ("learn both", None, "reset", "one device"),
    ],
)
def test_growth_by_parts_equals_growth_of_the_whole_state(name, optimizer, moments, on):
    source, growth, mesh = MODELS["gqa"], GROWTHS[name], mesh_of(on)
    target, whole = growth.target_config(source), state_of(source, optimizer or ADAMW)
    held, asked = by_path(whole), []

    def load(abstract):
        asked.append(len(jax.tree.leaves(abstract.params)))
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.device_put(held[jax.tree_util.keystr(path)], leaf.sharding),
            on_mesh(abstract, mesh),
        )

    tx = (optimizer or ADAMW).build(model.logical_axes(target))
    at_once = functools.partial(grow_state, growth, source, tx, optimizer_state=moments)
    if optimizer is None:
        at_once = functools.partial(at_once, optimizer_state="reset")
    expected = jax.jit(at_once)(whole, key=KEY)
    with jax.set_mesh(mesh):
        grown = grow_by_parts(growth, source, optimizer, load, KEY, moments)
        layout = on_mesh(jax.eval_shape(lambda: init_state(target, tx, KEY)), mesh)
    assert asked == [1] * len(jax.tree.leaves(whole.params))
    if optimizer is None:
        expected, layout = (
            dataclasses.replace(state, opt_state=None) for state in (expected, layout)
        )
    if name.startswith("learn"):  # other programs sum the products in another order
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, jax.device_get(grown), jax.device_get(expected))
    else:
        assert_same(grown, expected)
    for leaf, place in zip(jax.tree.leaves(grown), jax.tree.leaves(layout), strict=True):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


@pytest.fixture
def run(run_main):
    """Runs the grow command with these arguments."""
    return functools.partial(run_main, command.main)


def test_run_is_grown_with_its_optimizer_by_the_command(uncut, tmp_path, run):
    # The target is a run directory, but any directory works.
    target = tmp_path / "stage_0" / "train"
    moments = ("--optimizer-state", "grow")
    code, out, err = run(uncut / "stage_0/train", target, "--growth", "stack(2)", *moments)
    assert (code, err) == (0, "")
    assert re.search(r"stage_0/train/8: 1 layers x 16 channels.* after 1,024 tokens\n", out)
    assert "\nlayers  1 1\ntarget  2 layers x 16 channels" in out
    source, grown = last_state(uncut, 0), last_state(tmp_path, 0, step=0)
    for name, leaf in grown["params"]["layers"].items():
        np.testing.assert_array_equal(leaf, np.repeat(source["params"]["layers"][name], 2, 0))
    assert (grown["opt_state"][1]["count"], grown["step"]) == (8, 0)
    contents = read_contents(find_checkpoint(epath.Path(tmp_path)))
    assert contents.model.num_layers == 2
    assert contents.counts.tokens == 8 * 128


@pytest.mark.slow
def test_run_can_be_grown_repeatedly_by_the_command(uncut, tmp_path, run):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert run(uncut / "stage_0/train", once, "--growth", "stack(2)")[0] == 0
    growth = "width_split(embed=2, mlp=2, heads=2) + depth_zero(2)"
    config = uncut.parent / "config.py"
    code, out, err = run(once, twice, "--growth", growth, "--config", config)
    assert (code, err) == (0, "")
    assert "depth_zero(factor=2) keeps the function" in out
    assert "target  4 layers x 32 channels, 8/4 heads, 64 units" in out
    before, after = map(float, re.search(r"held-out (\S+) -> (\S+)", out).groups())
    (seam,) = (row for row in rows(uncut) if row["kind"] == "growth")
    # The command prints four digits. The run's growth stacks the same layers.
    assert before == pytest.approx(seam["held_out_loss"], abs=1e-4)
    assert after == pytest.approx(before, abs=2e-4)

    moments = ("--optimizer-state", "grow")
    code, _, err = run(twice, tmp_path / "x", "--growth", growth, *moments)
    assert code == 2
    assert re.search(r"twice/0 .*--optimizer-state", err)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_checkpoint_grown_with_its_optimizer_restores_like_a_run(uncut, tmp_path, run):
    args = ("--growth", "stack(2)", "--optimizer-state", "keep")
    assert run(uncut / "stage_0/train/6", tmp_path / "stage_0" / "train", *args)[0] == 0
    contents = read_contents(find_checkpoint(epath.Path(tmp_path)))
    mesh = mesh_of("one device")
    axes = model.logical_axes(contents.model)
    with jax.set_mesh(mesh):
        abstract = abstract_part(contents.model, ADAMW, axes)
        state, restored = load_whole(find_checkpoint(epath.Path(tmp_path)), abstract, mesh)
    assert restored.counts.tokens == 6 * 128
    before = last_state(uncut, 0, step=6)["opt_state"][1]["nu"]["head"]
    np.testing.assert_array_equal(state.opt_state[1].nu["head"], before)


@pytest.mark.slow
def test_bfloat16_moments_grow_and_stay_bfloat16(tmp_path, run):
    source, growth, mesh = tiny_model(num_layers=1), Stack(2), mesh_of("one device")
    state = jax.device_put(state_of(source, BFLOAT16))
    target = growth.target_config(source)
    tx = BFLOAT16.build(model.logical_axes(target))
    expected = jax.jit(
        functools.partial(grow_state, growth, source, tx, optimizer_state="grow")
    )(state, key=KEY)
    keep, phase = CheckpointConfig(every_tokens=1), phase_of(source, optimizer=BFLOAT16)
    with jax.set_mesh(mesh), Checkpoints(epath.Path(tmp_path), phase, keep) as checkpoints:
        checkpoints.save(4, state, Counts())
    grown = tmp_path / "grown" / phase.directory
    args = ("--growth", growth, "--optimizer-state", "grow")
    assert run(tmp_path, grown, *args)[0] == 0
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: expected)
        restored, _ = load_whole(epath.Path(grown) / "0", abstract, mesh)
    moments = last_state(tmp_path / "grown", 0, step=0)["opt_state"]
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(moments)}
    # Muon's coefficients are float32 and the counts are int32.
    assert dtypes == {"bfloat16", "float32", "int32"}
    assert_same(restored, expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize("array", ["params.final_norm", "opt_state.1.nu.final_norm"])
def test_nonfinite_arrays_are_rejected_unless_allowed(tmp_path, run, array):
    source, phase = tiny_model(num_layers=1), phase_of(tiny_model(num_layers=1))
    state = state_of(source, ADAMW)
    tree = state.params if array.startswith("params") else state.opt_state[1].nu
    tree["final_norm"] = np.array(tree["final_norm"])
    tree["final_norm"][3] = np.inf
    state = jax.device_put(state)
    keep = CheckpointConfig(every_tokens=1)
    with (
        jax.set_mesh(mesh_of("one device")),
        Checkpoints(epath.Path(tmp_path), phase, keep) as checkpoints,
    ):
        checkpoints.save(4, state, Counts())
    args = (checkpoints.directory, tmp_path / "x", "--growth", "stack(2)")
    args += ("--optimizer-state", "grow")
    code, _, err = run(*args)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{array} in {checkpoints.directory}/4 has NaN or infinity as float32" in err
    assert not (tmp_path / "x").exists()
    assert run(*args, "--allow-nonfinite")[0] == 0


@pytest.mark.slow
def test_growth_that_breaks_its_preservation_claim_writes_nothing(
    uncut, tmp_path, run, monkeypatch
):
    monkeypatch.setattr(Stack, "preserves_function", "always")
    args = ("--growth", "stack(2)", "--config", uncut.parent / "config.py")
    code, _, err = run(uncut / "stage_0/train", tmp_path / "x", *args)
    assert code == 2
    assert re.match(r"error: stack\(2\)\.preserves_function is 'always', but", err)
    assert not (tmp_path / "x").exists()


# Invalid arguments and the expected messages.
ERRORS = {
    "no such path": (("nowhere", "new", "stack(2)"), "there is no checkpoint in .*nowhere; na"),
    "no checkpoint": (("data", "new", "stack(2)"), "there is no checkpoint in .*data; name"),
    "target taken": (("uncut", "uncut", "stack(2)"), "output '.*uncut' exists already; remove"),
    "masks": (
        ("uncut", "new", "depth_random(2, 100)"),
        r"--growth is depth_random\(.*\), with masks .* works only inside a run",
    ),
    "learned moments": (
        ("uncut", "new", "learn(2)", "--optimizer-state", "grow"),
        r"--optimizer-state is 'grow', but learn\(factor=2\) has .* at reset",
    ),
    "no such layer": (
        ("uncut", "new", "layer_map(1-9)"),
        "'1-9' names layer 9 .* with 2 layers",
    ),
    "no such config": (
        ("uncut", "new", "stack(2)", "--config", "nowhere.py"),
        "--config nowhere.py: there is no such file",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_invalid_arguments_print_a_one_line_error(name, uncut, run):
    (source, target, growth, *rest), message = ERRORS[name]
    world = uncut.parent
    code, _, err = run(world / source, world / target, "--growth", growth, *rest)
    assert code == 2
    assert re.match(f"error: .*{message}.*\n$", err)
    assert not (world / "new").exists()


def test_model_with_a_partly_open_mask_is_rejected(tmp_path, run):
    source = tiny_model(num_layers=2)
    masks = DepthRandom(2, mask_tokens=4 * 64).reparameterizations(tiny_model(num_layers=1))
    phase = phase_of(source, reparameterizations=masks)
    keep = CheckpointConfig(every_tokens=1, keep_last=2)
    mesh = mesh_of("one device")
    with (
        jax.set_mesh(mesh),
        Checkpoints(epath.Path(tmp_path), phase, keep) as checkpoints,
    ):
        for step in (3, 4):
            state = jax.device_put(state_of(source, ADAMW))
            checkpoints.save(step, state, Counts())
    directory = tmp_path / phase.directory
    code, _, err = run(directory / "3", tmp_path / "x", "--growth", "stack(2)")
    assert code == 2
    assert re.match(r"error: .*train/3 .*fit.*\n$", err)
    fit = Learn(2).fit(source)
    assert not phase_of(source, fit=fit, reparameterizations=(fit,)).trains_model(10**9)
    # A model with open masks is a plain model.
    assert run(directory / "4", tmp_path / "x", "--growth", "stack(2)")[0] == 0
