"""One device, eight devices and two processes give the same run; missing processes."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from runs import ROOT, cut, losses, places, rows

from stackjax.run.train import train
from stackjax.runtime.cluster import Job
from stackjax.runtime.rendezvous import wait_for_all_processes
from stackjax.sharding.config import MeshConfig

# Devices sum floats in another order; sixteen steps amplify the difference.
RTOL = 1e-4

TWO_MESHES = """
import dataclasses

import config
from stackjax.sharding.config import MeshConfig


def get_config():
    run = config.get_config()
    first, second = run.stages
    stages = (first, dataclasses.replace(second, mesh=MeshConfig(replica=2)))
    return dataclasses.replace(run, mesh=MeshConfig(fsdp=4, tensor=2), stages=stages)
"""


def assert_same_losses(workdir, expected) -> None:
    """Asserts equal losses in all rows so far."""
    num_rows, num_losses = len(places(workdir)), len(losses(workdir))
    assert places(workdir) == places(expected)[:num_rows]
    np.testing.assert_allclose(losses(workdir), losses(expected)[:num_losses], rtol=RTOL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(process: int, port: int, heartbeat: int = 10) -> dict[str, str]:
    """Returns the environment variables of one process among two."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
        "JAX_HEARTBEAT_TIMEOUT": str(heartbeat),
    }


def run_two(world, args, signalled: dict[int, tuple[str, ...]]) -> list[tuple[int, str, str]]:
    """Returns exit code, stdout and stderr of two processes with four devices each.

    Args:
      signalled: The signal that each process sends itself, and when.
    """
    port = free_port()
    processes = [
        world.start(
            args,
            *signalled.get(process, ()),
            JAX_NUM_CPU_DEVICES="4",
            **environment(process, port),
        )
        for process in range(2)
    ]
    return finish(processes)


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Returns exit code, stdout and stderr of each process."""
    with ThreadPoolExecutor() as pool:  # a full pipe would block the other processes
        outputs = list(pool.map(lambda process: process.communicate(), processes))
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_two_processes_survive_a_kill_and_equal_one_process(world, uncut, tmp_path):
    both, alone = tmp_path / "both", tmp_path / "alone"
    (world.path / "two_meshes.py").write_text(TWO_MESHES)
    args = ["--config", str(world.path / "two_meshes.py"), "--workdir", str(both)]

    # The second save returns when the first is complete.
    killed = ("SIGKILL", "stackjax.checkpoint.save:Checkpoints.save", "after", "2")
    (code, _, stderr), (killed_code, _, killed_stderr) = run_two(world, args, {1: killed})
    assert killed_code == -9, killed_stderr
    assert code not in (0, -9)
    assert "another" in stderr

    # Only one process is signalled, while the model grows onto the other mesh.
    stopped = ("SIGTERM", "stackjax.training.compile:enter_phase", "before", "1")
    first, second = run_two(world, args, {0: stopped})
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    assert re.search(r"^stage 0, .* (2|5) steps$", first[1], re.MULTILINE), first[1]
    assert re.search(r"^stopped and saved at [\d,]+ tokens; ", first[1], re.MULTILINE)
    assert "tokens" not in second[1]  # Gloo writes some lines
    assert any(place[0] == "growth" for place in places(both))
    assert_same_losses(both, uncut)

    # One process with eight devices resumes the checkpoint of these two, on other meshes.
    cut(both, alone, 6)
    config = world.config("--mesh.replica", "2", workdir=alone)
    own = dataclasses.replace(config.stages[1], mesh=MeshConfig(tensor=2))
    train(dataclasses.replace(config, stages=(config.stages[0], own)))
    changes = [place for place in places(alone) if place[0] == "change"]
    assert len(places(alone)) == len(places(uncut)) + len(changes)
    np.testing.assert_allclose(losses(alone), losses(uncut), rtol=RTOL)


@pytest.mark.slow
def test_two_processes_read_a_mixture_like_one(world, mixture, tmp_path):
    both, alone = tmp_path / "both", tmp_path / "alone"
    args = ["--config", str(mixture), "--workdir"]
    assert world.run([*args, str(alone)])[0] == 0
    first, second = run_two(world, [*args, str(both)], {})
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert places(both) == places(alone)
    assert_same_losses(both, alone)


@pytest.mark.slow
def test_two_processes_probe_measure_and_stop_early_like_one(world, uncut, tmp_path):
    [loss, *_] = [row["held_out_loss"] for row in rows(uncut) if row["kind"] == "evaluation"]
    # Step 5 lies between the evaluations at steps 4 and 6.
    args = ["--stages.0.until.loss", repr(loss), "--evaluation.every-tokens", "256"]
    args += ["--evaluation.layers", "--probes.at-tokens", "256", "--probes.lag-tokens", "128"]
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert world.run(world.args(alone, *args))[0] == 0
    first, second = run_two(world, world.args(both, *args), {})
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    kinds = [row["kind"] for row in rows(both)]
    assert (kinds.count("trigger"), kinds.count("probe")) == (1, 1)
    [ending] = [row for row in rows(both) if row["kind"] == "trigger"]
    assert ending["tokens"] == 6 * 128
    assert len(places(both)) == len(places(alone))
    assert_same_losses(both, alone)
    of_layers = [
        [row["contribution"] for row in rows(path) if row["kind"] == "layers"]
        for path in (both, alone)
    ]
    for found, expected in zip(*of_layers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=RTOL)


def start_job(processes: list[int], num_processes: int, timeout: float) -> list[str | None]:
    """Returns the error of each process, or None."""
    address = f"localhost:{free_port()}"

    def one(process: int):
        try:
            return wait_for_all_processes(Job(address, num_processes, process), timeout)
        except OSError as error:
            return str(error).replace(address, "ADDRESS")

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def test_job_starts_when_all_processes_have_arrived():
    assert start_job([2, 0, 1], 3, 60) == [None, None, None]


def test_missing_process_is_named_with_host(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[008-010,12]")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu009")
    zero, three = start_job([0, 3], 5, 1)
    assert zero.startswith("processes 1, 2, 4 of 5 did not arrive at ADDRESS within 1 s;")
    assert "gpu008, gpu010, gpu12" in zero and "JAX_INITIALIZATION_TIMEOUT" in zero
    assert three.startswith("process 3 on gpu009 reached process 0 at ADDRESS")


def test_unreachable_process_0_is_named_with_address(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu009")
    (one,) = start_job([1], 2, 0.5)
    pattern = (
        r"process 1 on gpu009 could not reach process 0 at ADDRESS within 0.5 s \(.*refused\);"
    )
    assert re.match(pattern, one)


def test_foreign_connections_are_ignored():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        jobs = [Job(f"localhost:{port}", 2, process) for process in range(2)]
        zero = pool.submit(wait_for_all_processes, jobs[0], 60)
        while True:
            try:
                stranger = socket.create_connection(("localhost", port))
                break
            except ConnectionRefusedError:
                continue
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert wait_for_all_processes(jobs[1], 60) is None
        assert zero.result() is None


def test_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen at {address} .*in use"):
            wait_for_all_processes(Job(address, 2, 0), 1)


FAIL = """
import sys
import threading

from stackjax.runtime import distributed, errors

_, who, seconds = sys.argv
distributed.REPLY_SECONDS = int(seconds)
with errors.one_line_errors(), distributed.errors_once():
    distributed.initialize()
    if who in ("both", str(distributed.distributed.global_state.process_id)):
        raise FileNotFoundError("no disk")
    threading.Event().wait(60)
"""


def test_common_error_is_printed_once_and_lone_error_with_its_process():
    def start(who: str, seconds: int, heartbeat: int) -> list[subprocess.Popen]:
        port = free_port()
        return [
            subprocess.Popen(
                [sys.executable, "-c", FAIL, who, str(seconds)],
                env=os.environ
                | environment(process, port, heartbeat)
                | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(2)
        ]

    # The process that is left behind waits for the heartbeats of the other.
    shared, alone = start("both", 60, 10), start("1", 1, 3)
    assert finish(shared) == [(2, "", "error: no disk\n"), (2, "", "")]
    (code, _, left_behind), failed = finish(alone)
    line = f"process 1 of 2 on {socket.gethostname()}: error: no disk\n"
    assert failed == (2, "", line)
    assert code not in (0, 2)
    assert "another task died" in left_behind


AGREE = """
import sys

from stackjax.runtime import distributed, errors
from stackjax.runtime.agreement import check_agreement, from_process_0, program

with errors.one_line_errors(), distributed.errors_once():
    distributed.initialize()
    process = distributed.distributed.global_state.process_id
    assert from_process_0(lambda: {"read by": process}) == {"read by": 0}
    same = {"seed": 0, "model.num_layers": 12}
    check_agreement(program() | same)
    if sys.argv[1] == "missing":
        from_process_0(lambda: open("/nowhere/phase.json"))
    check_agreement(same | {"optimizer.peak_learning_rate": 0.01 * (1 + process)})
"""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "rates",
            r"error: process 1 on HOST has optimizer.peak_learning_rate 0.02, not 0.01, "
            r"unlike process 0 on HOST; start the same command .* on every host.",
        ),
        ("missing", r"error: .*No such file or directory: '/nowhere/phase.json'"),
    ],
)
def test_processes_share_values_of_process_0_and_must_agree(case, message):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, case],
            env=os.environ | environment(process, port) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    (code, _, said), (other_code, _, other_said) = finish(processes)
    assert (code, other_code, other_said) == (2, 2, "")
    assert re.fullmatch(message.replace("HOST", socket.gethostname()) + "\n", said)
