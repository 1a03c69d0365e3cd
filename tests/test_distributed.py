"""One device, eight devices, two processes: the same examples, the same losses."""

import dataclasses
import socket
import subprocess

import numpy as np
from runs import cut, losses, places

from stackjax.sharding import MeshConfig
from stackjax.train import train

# Sums over devices add floats in another order; sixteen steps amplify that a little.
RTOL = 1e-4


def assert_same_losses(workdir, expected) -> None:
    assert places(workdir) == places(expected)
    np.testing.assert_allclose(losses(workdir), losses(expected), rtol=RTOL)


def test_eight_devices_train_like_one(world, uncut, tmp_path):
    mesh = ("--mesh.fsdp", "4", "--mesh.tensor", "2")
    train(world.config("--workdir", str(tmp_path), *mesh))
    assert_same_losses(tmp_path, uncut)


def test_a_run_resumes_on_another_mesh_and_a_stage_has_its_own(world, uncut, tmp_path):
    cut(uncut, tmp_path, 6)
    config = world.config("--workdir", str(tmp_path), "--mesh.replica", "2")
    own = dataclasses.replace(config.stages[1], mesh=MeshConfig(tensor=2))
    train(dataclasses.replace(config, stages=(config.stages[0], own)))
    assert_same_losses(tmp_path, uncut)


def start_two(world, args, *signalled) -> list[subprocess.Popen]:
    """Starts a run of two processes with four devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        world.start(
            args,
            *signalled,
            JAX_NUM_CPU_DEVICES="4",
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(process),
        )
        for process in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, list[str]]]:
    """Returns exit code and lines of stdout of each process."""
    outputs = [process.communicate()[0].splitlines() for process in processes]
    return [(p.returncode, lines) for p, lines in zip(processes, outputs, strict=True)]


def test_two_processes_stop_together_and_train_like_one(world, uncut, tmp_path):
    args = world.args(tmp_path, "--mesh.fsdp", "4", "--mesh.tensor", "2")
    # Early: JAX lets both run on until they have agreed on the step to stop at.
    point = ("stackjax.train:should_stop", "before", "4")
    first, second = finish(start_two(world, args, "SIGTERM", *point))
    assert (first[0], second[0]) == (143, 143)
    assert first[1][-1].startswith("stopped and saved at ")
    first, second = finish(start_two(world, args))
    assert (first[0], second[0]) == (0, 0)
    assert not any("tokens" in line for line in second[1])  # Gloo writes some
    assert_same_losses(tmp_path, uncut)
