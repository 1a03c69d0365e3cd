"""Optimizer moments in the host's memory."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import mesh_of, phase_of, random_batch, tiny_model
from runs import cut, last_state, losses, rarely_saved, rows

from stackjax.config import ProbeConfig, SpikeConfig
from stackjax.config_file import load_config
from stackjax.data.device import batch_sharding
from stackjax.run.hooks import Hook
from stackjax.run.train import train
from stackjax.sharding.host_memory import on_device, on_host
from stackjax.training.compile import jit_step, phase_optimizer
from stackjax.training.preflight import check
from stackjax.training.train_state import init_state, placed


def run_config(world, workdir, memory):
    """A run of two stages with a probe, kept moments and a check for spikes."""
    config = rarely_saved(world.config(workdir=workdir))
    first, second = (
        dataclasses.replace(stage, moment_memory=memory) for stage in config.stages
    )
    return dataclasses.replace(
        config,
        stages=(first, dataclasses.replace(second, optimizer_state="keep")),
        probes=ProbeConfig(at_tokens=(7 * 128,), lag_tokens=128),
        spikes=SpikeConfig(action="skip"),
    )


def bytes_on_device() -> int:
    arrays = (each for each in jax.live_arrays() if each.sharding.memory_kind == "device")
    return sum(each.nbytes for each in arrays)


def memory_kinds(state) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}


def test_step_takes_and_returns_moments_on_the_host_and_changes_no_bit():
    mesh = mesh_of("fsdp 4, tensor 2")
    with jax.set_mesh(mesh):
        batch, states = jax.device_put(random_batch(), batch_sharding(mesh)), {}
        for memory in ("device", "pinned_host"):
            phase = phase_of(tiny_model(), moment_memory=memory.removeprefix("pinned_"))
            tx = phase_optimizer(phase)
            init = jax.jit(functools.partial(init_state, phase.model, tx))
            state = placed(phase, init(jax.random.key(0)))
            for _ in range(2):
                state, _ = jit_step(phase)(phase.step_inputs, state, batch)
            assert memory_kinds(state) == {memory}
            states[memory] = state
    jax.tree.map(np.testing.assert_array_equal, *states.values())


def test_only_arrays_on_the_host_are_copied_to_the_device():
    kept, moved = jax.device_put((np.ones(3), np.ones(3)))
    found = on_device({"kept": kept, "moved": on_host(moved)})
    assert found["kept"] is kept
    assert found["moved"].sharding.memory_kind == "device"


@pytest.mark.slow
def test_run_with_moments_on_the_host_equals_run_with_moments_on_the_device(world, tmp_path):
    device, host, resumed = (tmp_path / name for name in ("device", "host", "resumed"))
    held = {}
    for path, memory in ((device, "device"), (host, "host")):
        before = bytes_on_device()
        sizes = held[memory] = []
        hook = Hook(
            kind="held",
            when=lambda step: True,
            on_step=lambda step, sizes=sizes: sizes.append(bytes_on_device()) or {},
        )
        train(run_config(world, path, memory), hooks=[hook])
        held[memory] = np.array(sizes) - before
    assert rows(host) == rows(device)
    # Parameters and a batch remain on the device.
    assert len(held["host"]) == 16
    assert all(held["host"] < 0.6 * held["device"])
    # The memory may change when a run resumes.
    cut(device, resumed, 8)
    train(run_config(world, resumed, "host"))
    assert losses(resumed) == losses(device)
    for found in (host, resumed):
        states = last_state(device, 1), last_state(found, 1)
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_moments_on_the_host_need_no_memory_of_the_device():
    held = {}
    for memory in ("device", "host"):
        options = [f"--stages.{stage}.moment-memory={memory}" for stage in (0, 1)]
        config = load_config("test", ["--config", "configs/gstack_1b.py", *options])
        held[memory] = [estimate.state_bytes for estimate in check(config, 8)]
    # Two float32 moments beside each float32 parameter.
    assert held["host"] == pytest.approx([size / 3 for size in held["device"]], rel=1e-4)
