"""Several hosts as one machine."""

import os

import jax

_PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def initialize() -> None:
    """Joins the other processes of the job, where the environment says there are some.

    Slurm, Open MPI and TPU pods are found by JAX itself; elsewhere set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    several = any(int(os.environ.get(name, "1")) > 1 for name in _PROCESS_COUNTS)
    tpu_pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    elif several or tpu_pod:
        jax.distributed.initialize()
