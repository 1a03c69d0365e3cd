"""Multi-host start-up and shutdown."""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
from jax._src import distributed  # JAX's barriers have no public name

from stackjax.runtime.cluster import env_int, find_job, this_host
from stackjax.runtime.errors import describe
from stackjax.runtime.rendezvous import (
    INITIALIZATION_TIMEOUT,
    REPLY_SECONDS,
    wait_for_all_processes,
)

_HEARTBEAT_TIMEOUT = "JAX_HEARTBEAT_TIMEOUT"


def initialize() -> None:
    """Joins the job's other processes, if the environment describes a job.

    Raises:
      UserError: Some environment variables are missing or invalid.
      TimeoutError: Some processes did not start in time.
    """
    timeout = env_int(INITIALIZATION_TIMEOUT, 1, default="300")
    heartbeat_timeout = env_int(_HEARTBEAT_TIMEOUT, 1, default="100")
    job = find_job(timeout)
    if job is None:
        return
    wait_for_all_processes(job, timeout)
    jax.distributed.initialize(
        job.address,
        job.num_processes,
        job.process_id,
        job.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )


@contextlib.contextmanager
def errors_once() -> Iterator[None]:
    """Ends a failed job. If all processes fail with the same error, only process 0 prints it.

    A process that fails alone ends at once, because JAX's exit would wait for the others while
    the others wait for this process. The others then miss heartbeats and end too.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized():
            raise
        this = distributed.global_state
        text, code = _describe(error)
        if this.process_id == 0:
            print(text, file=sys.stderr, flush=True)
        try:
            assert this.client is not None
            this.client.wait_at_barrier(text.splitlines()[-1], 1000 * REPLY_SECONDS)
        except jax.errors.JaxRuntimeError:
            if this.process_id != 0:
                name = f"process {this.process_id} of {this.num_processes} on {this_host()}"
                print(f"{name}: {text}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)


def _describe(error: BaseException) -> tuple[str, int]:
    if isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in str(error):
        reason = str(error).splitlines()[0]
        return f"error: another process has ended; see its log ({reason}).", 1
    return describe(error)
