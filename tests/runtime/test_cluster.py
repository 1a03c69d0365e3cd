"""Multi-process jobs found in the environment: Slurm, Open MPI, Kubernetes, TPU slices."""

import importlib.util
import os

import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from stackjax.runtime import cluster, distributed
from stackjax.runtime.cluster import Job, find_job

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host0:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
# The third task on the second node; JAX derives the port from the job number.
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
}
SLURM_SHELL = {
    "SLURM_STEP_NODELIST": "gpu08",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPI_4 = MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "pod-0"}
GKE_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "TPU_WORKER_ID": "1",
    "TPU_SKIP_MDS_QUERY": "true",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.fixture
def find(monkeypatch):
    """A function from environment variables to the job."""

    def find(variables: dict[str, str]) -> Job | None:
        monkeypatch.setattr(os, "environ", dict(variables))
        return find_job(timeout=1)

    return find


@pytest.mark.parametrize(
    "variables",
    [
        {},
        EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"JAX_NUM_PROCESSES": "1"},
        SLURM | SLURM_SHELL,  # a shell in an allocation with eight tasks
        without(SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),  # sbatch without srun
        MPI_4 | {"OMPI_COMM_WORLD_SIZE": "1"},
        POD,
    ],
)
def test_single_process_has_no_job(find, variables):
    assert find(variables) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (EXPLICIT, Job("host0:1234", 2, 1)),
        (SLURM | EXPLICIT, Job("host0:1234", 2, 1)),
        (SLURM, Job("gpu08:62344", 8, 6, [2])),
        (SLURM | {"JAX_COORDINATOR_PORT": "1234"}, Job("gpu08:1234", 8, 6, [2])),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Job("gpu08:62344", 8, 6)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Job("gpu08:62344", 8, 6)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,7"}, Job("gpu08:62344", 8, 6, [2])),
        (MPI_4, Job("10.96.0.1:62880", 4, 3, [1])),
        (MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Job("10.96.0.1:62880", 4, 3)),
        # mpirun starts daemons with srun.
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"} | MPI_4,
            Job("10.96.0.1:62880", 4, 3, [1]),
        ),
    ],
)
def test_job_is_found_for_each_launcher(find, variables, expected):
    assert find(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            without(EXPLICIT, "JAX_PROCESS_ID"),
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES without JAX_PROCESS_ID: set all",
        ),
        (
            {"JAX_PROCESS_ID": "1"},
            "JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES: set all",
        ),
        (
            SLURM | {"JAX_NUM_PROCESSES": "8"},
            "JAX_NUM_PROCESSES without JAX_COORDINATOR_ADDRESS",
        ),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host0"}, "'host0', but has to be host:port"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host0:99999"}, "but has to be host:port"),
        (
            EXPLICIT | {"JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES is 'two', but has to be a",
        ),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "0"}, "'0', but has to be a whole number from 1 on"),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "'-1', but has to be a whole number from 0 to 1"),
        (EXPLICIT | {"JAX_PROCESS_ID": "2"}, "'2', but has to be a whole number from 0 to 1"),
        (
            without(SLURM, "SLURM_JOB_ID"),
            "Slurm has started several processes, but JAX finds no",
        ),
        (
            MPI_4 | {"OMPI_MCA_orte_hnp_uri": "1.0;usock"},
            "of Open MPI: Could not parse",
        ),
        (
            MPI_5,
            "Open MPI has started several processes, .*: pip install mpi4py, or set JAX_CO",
        ),
        (
            POD | {"JOB_COMPLETION_INDEX": "0"},
            "Kubernetes .*: pip install kubernetes, or set JAX",
        ),
    ],
)
def test_incomplete_environment_is_refused(find, variables, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message) as error_info:
        find(variables)
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("", []),
        ("gpu08", ["gpu08"]),
        ("gpu[08-10,12],cpu1", ["gpu08", "gpu09", "gpu10", "gpu12", "cpu1"]),
        ("r[0-1]n[1-2]-ib", ["r0n1-ib", "r0n2-ib", "r1n1-ib", "r1n2-ib"]),
    ],
)
def test_slurm_node_list_is_expanded(nodes, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", {"SLURM_STEP_NODELIST": nodes})
    assert cluster.all_hosts() == expected


@pytest.mark.parametrize("name", ["JAX_INITIALIZATION_TIMEOUT", "JAX_HEARTBEAT_TIMEOUT"])
@pytest.mark.parametrize("value", ["", "0", "1.5", "5m"])
def test_invalid_timeout_is_refused(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but has to be a whole number"):
        distributed.initialize()


@pytest.mark.parametrize(
    ("variables", "metadata", "expected"),
    [
        (GKE_TPU, {}, Job("localhost:8482", 2, 1)),
        (GKE_TPU | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, None),
        ({}, {"worker-network-endpoints": "localhost,localhost"}, Job("localhost:8482", 2, 1)),
        ({}, {"worker-network-endpoints": "localhost"}, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, {}, None),
    ],
)
def test_tpu_host_joins_the_slice(find, variables, metadata, expected, monkeypatch):
    values = metadata | {"agent-worker-number": "1", "tpu-env": ""}
    for module in (cluster, clusters.cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (values[key], 200))
    assert find(variables) == expected
