"""Checkpoints: saving, restoring, retention and lookup."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, random_params, tiny_model, tiny_run
from etils import epath
from orbax.checkpoint import v1 as ocp

from stackjax import model
from stackjax.checkpoint.contents import Contents, OptimizerForm, to_json
from stackjax.checkpoint.directory import clear, find_checkpoint, newest_step
from stackjax.checkpoint.lineage import begin, spend
from stackjax.checkpoint.restore import load_whole, read_contents, read_types
from stackjax.checkpoint.save import Checkpoints
from stackjax.config import CheckpointConfig, Stage
from stackjax.files.json_file import seal
from stackjax.files.storage import replace_text
from stackjax.runtime.errors import UserError
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import abstract_state
from stackjax.training.expand import expand
from stackjax.training.phase import Change, Counts, EarlyEnd, Waypoint
from stackjax.training.run_history import (
    RunHistory,
    after_entering,
    read_history,
    write_history,
)
from stackjax.training.train_state import TrainState

RUN = tiny_run(model=tiny_model(num_layers=2), stages=(Stage(tokens=640, batch_size=8),))
(PHASE,) = expand(RUN)
KEEP = RUN.checkpoints
COUNTS = Counts(tokens=2**40, examples=3, flops_6nd=10**22, flops=2**70 + 1)


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path / "run")


@functools.cache
def host_state() -> TrainState:
    """Returns a state with nonzero moments and counts."""
    params = random_params(PHASE.model)
    tx = RUN.optimizer.build(model.logical_axes(PHASE.model))
    opt_state = jax.tree.map(lambda leaf: np.asarray(leaf + 3), tx.init(params))
    return TrainState(np.asarray(4, np.int32), params, opt_state)


def state_on(mesh) -> TrainState:
    """Returns the state sharded over a mesh."""
    layout = on_mesh(abstract_state(PHASE), mesh)
    return jax.device_put(host_state(), jax.tree.map(lambda leaf: leaf.sharding, layout))


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize("restored_on", ["one device", "fsdp 8", "fsdp 4, tensor 2"])
def test_states_restore_bit_for_bit_on_any_mesh(workdir, restored_on):
    mesh = mesh_of("fsdp 8")
    with jax.set_mesh(mesh), Checkpoints(workdir, PHASE, KEEP) as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save(4, state_on(mesh), COUNTS)
        assert checkpoints.latest_step == 4
    mesh = mesh_of(restored_on)
    with jax.set_mesh(mesh):
        abstract = abstract_state(PHASE)
        state, contents = load_whole(workdir / PHASE.directory / "4", abstract, mesh)
    # Counts are Python integers without a size limit.
    assert contents.counts == COUNTS
    assert_same(state, host_state())
    for leaf, place in zip(
        jax.tree.leaves(state), jax.tree.leaves(on_mesh(abstract, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


def test_donating_a_state_after_save_does_not_change_the_checkpoint(workdir):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: -leaf - 1, tree), donate_argnums=0)
    mesh = mesh_of("fsdp 8")
    with jax.set_mesh(mesh), Checkpoints(workdir, PHASE, KEEP) as checkpoints:
        state = state_on(mesh)
        # Compile first, so the overwrite directly follows the save.
        spoil(state_on(mesh))
        checkpoints.save(4, state, COUNTS)
        jax.block_until_ready(spoil(state))
        checkpoints.wait()
        newest = checkpoints.directory / "4"
        restored, _ = load_whole(newest, abstract_state(PHASE), mesh)
    assert_same(restored, host_state())


def saved_steps(workdir, config, steps, phase=PHASE, counts=lambda step: COUNTS):
    """Returns the checkpoint steps left after saving `steps`."""
    mesh = mesh_of("one device")
    small = TrainState(jnp.int32(0), {"w": jnp.zeros(3)}, ())
    with jax.set_mesh(mesh), Checkpoints(workdir, phase, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, small, counts(step))
    left = (workdir / phase.directory).iterdir()
    return sorted(int(path.name) for path in left if path.name.isdecimal())


def test_keep_last_keeps_the_newest_checkpoints(workdir):
    config = CheckpointConfig(every_tokens=64, keep_last=3)
    assert saved_steps(workdir, config, range(6)) == [3, 4, 5]


def test_keep_every_tokens_keeps_the_first_checkpoint_past_each_multiple(workdir):
    # A step has 64 tokens. A checkpoint is due every 80 tokens and kept every 160 tokens. The
    # multiples of 160 fall into steps 3, 5 and 8.
    config = CheckpointConfig(every_tokens=80, keep_last=1, keep_every_tokens=160)
    steps = [0, 2, 3, 4, 5, 7, 8, 9, 10]
    assert saved_steps(workdir, config, steps) == [3, 5, 8, 10]


def test_keep_every_tokens_counts_over_the_run(workdir):
    start = Counts(tokens=100)
    phase = dataclasses.replace(PHASE, start=start, waypoint=Waypoint(step=0, counts=start))
    config = CheckpointConfig(every_tokens=160, keep_last=1, keep_every_tokens=160)
    # Step n ends at 100 + 64 n tokens, so 160 and 320 fall into steps 1 and 4.
    assert saved_steps(workdir, config, range(6), phase) == [1, 4, 5]


def test_step_is_saved_only_once(workdir):
    config = CheckpointConfig(every_tokens=64)
    assert saved_steps(workdir, config, [2, 2]) == [2]
    assert saved_steps(workdir, config, [2]) == [2]


def other_model(**fields):
    return expand(dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, **fields)))[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_layers": 3},
            r"layers.attention_norm is float32\[2, 16\], and .* float32\[3, 16\] \(8 such",
        ),
        (
            {"tie_head": True},
            r"head is float32\[16, 24\], and the config's model has none \(1 such",
        ),
        ({"qk_norm": True}, r"layers.key_norm is not there, .* has float32\[2, 6\] \(2 such"),
    ],
)
def test_checkpoint_of_another_model_is_rejected_by_parameter(workdir, fields, message):
    mesh = mesh_of("one device")
    with jax.set_mesh(mesh), Checkpoints(workdir, PHASE, KEEP) as checkpoints:
        checkpoints.save(4, state_on(mesh), COUNTS)
        checkpoints.wait()
        with pytest.raises(ValueError, match=f"checkpoint of another model: {message}"):
            abstract = abstract_state(other_model(**fields))
            load_whole(checkpoints.directory / "4", abstract, mesh)


def test_history_names_the_last_committed_phase(workdir):
    workdir.mkdir()
    assert read_history(workdir) == RunHistory()
    history, source = RunHistory(), None
    for phase in expand(tiny_run()):
        history = after_entering(history, source, phase)
        change = Change(phase=phase.index, step=2, tokens=9, fields=("seed: 0 -> 1",))
        history = dataclasses.replace(
            history,
            ended={**history.ended, phase.stage: EarlyEnd(steps=3, reason="enough")},
            changes=(*history.changes, change),
        )
        write_history(workdir, history)
        assert read_history(workdir) == history
        source = phase
    assert (history.phase, history.directory) == (1, "stage_1/train")
    first, _ = expand(tiny_run())
    assert history.waypoints == {0: Waypoint(step=first.num_steps, counts=first.end)}
    assert [path.name for path in workdir.iterdir()] == ["phase.json"]


def test_interrupted_write_keeps_the_old_file(workdir, monkeypatch):
    workdir.mkdir()
    path = workdir / "phase.json"
    history = {"phase": 1, "directory": "stage_1/train", "ended": {}}
    replace_text(path, json.dumps(seal(history)))

    def killed(*_):
        raise KeyboardInterrupt

    # The text goes to a temporary file first. The interrupt comes before the rename.
    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_text(path, json.dumps(seal(history | {"phase": 2})))
    assert read_history(workdir).phase == 1
    assert [path.name for path in workdir.iterdir()] == ["phase.json"]


def test_newest_step_ignores_incomplete_checkpoints(workdir):
    assert newest_step(workdir, PHASE) is None
    assert not (workdir / PHASE.directory).exists()
    saved_steps(workdir, KEEP, [9])
    # A killed run's unfinished save.
    (workdir / PHASE.directory / "10.orbax-checkpoint-tmp-1").mkdir()
    for name in ("010", "\N{ARABIC-INDIC DIGIT ONE}1"):
        (workdir / PHASE.directory / name).mkdir()
    assert newest_step(workdir, PHASE) == 9
    with pytest.raises(UserError, match="there is no checkpoint in"):
        find_checkpoint(workdir / PHASE.directory / "010")
    saved_steps(workdir, KEEP, [10])
    assert newest_step(workdir, PHASE) == 10


def test_checkpoint_is_found_from_its_run_and_records_its_model(workdir):
    phases = expand(tiny_run())
    for phase, steps in zip(phases, ([2, 9], [3]), strict=True):
        saved_steps(workdir, KEEP, steps, phase)
    write_history(workdir, after_entering(RunHistory(), None, phases[0]))
    first, second = (workdir / phase.directory for phase in phases)
    table = {first: first / "9", first / "2": first / "2", workdir: first / "9"}
    for path, found in table.items():
        assert find_checkpoint(path) == found
    write_history(workdir, after_entering(RunHistory(), None, phases[1]))
    assert find_checkpoint(workdir) == second / "3"
    contents = read_contents(second / "3")
    lineage = spend(begin((), phases[1]), phases[1], 3)
    assert contents == Contents(
        COUNTS,
        phases[1].model,
        is_model=True,
        lineage=lineage,
        optimizer=OptimizerForm("adamw"),
    )
    assert read_types(second / "3")["params.w"] == "float32[3]"
    # Orbax reads the same metadata, but more slowly.
    assert to_json(contents) == ocp.metadata(second / "3").custom_metadata


def test_checkpoint_without_lineage_is_rejected(workdir):
    foreign = {"counts": {}, "model": {}, "is_model": True}
    with ocp.training.Checkpointer(workdir / PHASE.directory) as checkpointer:
        checkpointer.save(3, {"w": np.zeros(2)}, custom_metadata=foreign)
    with pytest.raises(UserError, match=r"3 is damaged: its fields do not match their hash"):
        read_contents(find_checkpoint(workdir))


@pytest.mark.parametrize("path", ["", "nowhere", "stage_0/train/5", "stage_1/train"])
def test_path_without_checkpoint_is_rejected(workdir, path):
    saved_steps(workdir, KEEP, [4])
    with pytest.raises(ValueError, match=r"no checkpoint in .*; name a run directory"):
        find_checkpoint((workdir if path else workdir.parent) / path)


def test_clear_removes_only_its_phase(workdir):
    first, second = expand(tiny_run())
    for phase in (first, second):
        saved_steps(workdir, KEEP, [0], phase)
    clear(workdir, second)
    assert (workdir / first.directory / "0").exists()
    assert not (workdir / second.directory).exists()
    clear(workdir, second)  # clearing a missing phase is allowed


def test_full_disk_is_an_os_error_with_a_fix(workdir, monkeypatch):
    mesh = mesh_of("one device")
    with jax.set_mesh(mesh), Checkpoints(workdir, PHASE, KEEP) as checkpoints:

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

        monkeypatch.setattr(checkpoints._checkpointer, "save_async", full)
        with pytest.raises(OSError, match=r"could not be written to .* the same command"):
            checkpoints.save(1, state_on(mesh), COUNTS)
        assert checkpoints.latest_step is None
