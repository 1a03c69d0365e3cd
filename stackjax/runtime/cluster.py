"""The processes of a multi-host job, from environment variables."""

import dataclasses
import importlib.util
import itertools
import os
import re
import socket

from jax._src import clusters  # JAX's cluster detection has no public name
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

from stackjax.runtime.errors import UserError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SET_THEM = f"set {', '.join(_EXPLICIT[:2])} and {_EXPLICIT[2]}"


@dataclasses.dataclass(frozen=True)
class Job:
    """The address and number of the processes, and the index of this process."""

    address: str
    """Host and port of process 0."""
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None
    """This process's devices on this host; None for all."""


def find_job(timeout: int) -> Job | None:
    """Returns the job from the environment variables; None for a single process.

    Args:
      timeout: Seconds to wait for the name of process 0's host, on TPU slices.

    Raises:
      UserError: Some variables are missing or invalid.
    """
    missing = [name for name in _EXPLICIT if name not in os.environ]
    if not missing:
        return _explicit_job()
    if os.environ.get("JAX_NUM_PROCESSES") == "1":
        return None
    if len(missing) < len(_EXPLICIT):
        present = " and ".join(name for name in _EXPLICIT if name in os.environ)
        raise UserError(
            f"{present} without {' and '.join(missing)}: set all three, or none of them."
        )
    launcher = _launcher()
    return None if launcher is None else _detected_job(launcher, timeout)


def _explicit_job() -> Job | None:
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}, but has to be host:port, the same in "
            f"every process: a name or address of process 0's host, and a free port there."
        )
    num_processes = env_int("JAX_NUM_PROCESSES", 1)
    process_id = env_int("JAX_PROCESS_ID", 0, num_processes - 1)
    return Job(address, num_processes, process_id) if num_processes > 1 else None


def env_int(name: str, least: int, most: int | None = None, default: str = "") -> int:
    """Returns the value of an environment variable; UserError for a value out of range."""
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        to = "on" if most is None else f"to {most}"
        raise UserError(f"{name} is {text!r}, but has to be a whole number from {least} {to}.")
    return int(text)


def _launcher() -> str | None:
    """Returns the launcher of this process, if it may have launched other processes too.

    For Slurm the tasks of the job step count. A shell inside an allocation is alone, even if
    the allocation has many tasks.
    """
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "Slurm"
    if running_in_cloud_tpu_vm:
        return "TPU"
    if os.environ.keys() >= {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}:
        return "Kubernetes"
    return None


def _detected_job(launcher: str, timeout: int) -> Job | None:
    """Returns the job from JAX's cluster detection; None for a single process."""
    method = package = None
    if launcher == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        method = package = "mpi4py"  # Open MPI 5 sets no address in the environment.
    if launcher == "Kubernetes":
        package = "kubernetes"
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"{launcher} has started several processes, and JAX needs the package {package} to "
            f"find them: pip install {package}, or {_SET_THEM}, or set only "
            f"JAX_NUM_PROCESSES=1 for a single process."
        )
    try:
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        found = detect(None, None, None, None, method, timeout)
    except RuntimeError as error:
        raise UserError(
            f"JAX cannot find the other processes of {launcher}: {error}; fix the cause, or "
            f"{_SET_THEM}."
        ) from error
    address, num_processes, process_id, local_device_ids = found
    if num_processes == 1 or (launcher == "TPU" and num_processes is None):
        return None
    if address is None or num_processes is None or process_id is None:
        raise UserError(
            f"{launcher} has started several processes, but JAX finds no address, number or "
            f"index of them in the environment; {_SET_THEM}."
        )
    # JAX gives each task of Slurm and Open MPI one device, even a host's only task.
    if "JAX_LOCAL_DEVICE_IDS" in os.environ or _has_one_task_per_host(launcher):
        local_device_ids = None
    devices = None if local_device_ids is None else list(local_device_ids)
    return Job(address, num_processes, process_id, devices)


def _has_one_task_per_host(launcher: str) -> bool:
    if launcher == "Open MPI":
        return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 1(x4) or 8(x3),4
    return launcher == "Slurm" and re.fullmatch(r"1(\(x\d+\))?", tasks) is not None


def all_hosts() -> list[str]:
    """Returns the job's host names, or an empty list if the environment has none."""
    if "TPU_WORKER_HOSTNAMES" in os.environ:
        return os.environ["TPU_WORKER_HOSTNAMES"].split(",")
    return _expand_node_list(os.environ.get("SLURM_STEP_NODELIST", ""))


def this_host() -> str:
    """Returns the name of this host, as in `all_hosts`."""
    if "TPU_WORKER_HOSTNAMES" in os.environ and "TPU_WORKER_ID" in os.environ:
        return all_hosts()[int(os.environ["TPU_WORKER_ID"])]
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _expand_node_list(nodes: str) -> list[str]:
    """Returns the names in a Slurm node list: gpu[08-09,12],cpu1 is gpu08 gpu09 gpu12 cpu1."""
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        parts = [
            [part] if not part.startswith("[") else _expand_ranges(part[1:-1])
            for part in re.findall(r"[^\[]+|\[[^\]]*\]", item)
        ]
        names += ["".join(choice) for choice in itertools.product(*parts)]
    return names


def _expand_ranges(ranges: str) -> list[str]:
    """Returns the numbers in a text such as 08-09,12, with leading zeros."""
    numbers = []
    for text in ranges.split(","):
        first, _, last = text.partition("-")
        last = last or first
        numbers += [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return numbers
