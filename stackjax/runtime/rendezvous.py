"""Start of a multi-host job: process 0 waits for all others, and names the missing ones."""

import contextlib
import socket
import time

from stackjax.runtime.cluster import Job, all_hosts, this_host

INITIALIZATION_TIMEOUT = "JAX_INITIALIZATION_TIMEOUT"
"""Environment variable for the timeout in seconds."""
REPLY_SECONDS = 5
"""Timeout for replies: a healthy process replies at once."""


def wait_for_all_processes(job: Job, timeout: float) -> None:
    """Waits until all processes of the job have started.

    If a process is missing, JAX itself aborts without naming the process.

    Args:
      timeout: Seconds.

    Raises:
      TimeoutError: Some processes did not start. Process 0 names them.
    """
    if job.process_id == 0:
        _wait_for_all(job, timeout)
    else:
        _report(job, timeout)


def _wait_for_all(job: Job, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    missing, arrived = set(range(1, job.num_processes)), {this_host()}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(job))
        connections = []
        while missing and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            # Ignore other connections, such as a port scanner.
            with contextlib.suppress(OSError, ValueError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(REPLY_SECONDS)
                process, host = connection.makefile().readline(300).split()
                connections.append(connection)
                missing.discard(int(process))
                arrived.add(host)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"stop\n" if missing else b"go\n")
    if missing:
        raise TimeoutError(_absence(job, timeout, sorted(missing), arrived))


def _listen(job: Job) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", int(job.address.rpartition(":")[2])),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=job.num_processes,
        )
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen at {job.address} ({error}); free the port, or choose "
            f"another port, with JAX_COORDINATOR_PORT if a launcher sets the address."
        ) from error


def _absence(job: Job, timeout: float, missing: list[int], arrived: set[str]) -> str:
    """Returns the message about missing processes.

    Args:
      arrived: Hosts with a process present.
    """
    several = "es" if len(missing) > 1 else ""
    numbers = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    silent = [host for host in all_hosts() if host not in arrived]
    where = f"; hosts without a process: {', '.join(silent)}" if silent else ""
    return (
        f"process{several} {numbers} of {job.num_processes} did not arrive at {job.address} "
        f"within {timeout} s{where}; see their logs, or set {INITIALIZATION_TIMEOUT} to more "
        f"seconds if they are slow."
    )


def _report(job: Job, timeout: float) -> None:
    """Reports this process to process 0, and waits until all processes have reported."""
    host, _, port = job.address.rpartition(":")
    deadline, reason = time.monotonic() + timeout, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), left) as connection:
                connection.sendall(f"{job.process_id} {this_host()}\n".encode())
                # Process 0 may have started later, with a later deadline than this process.
                connection.settimeout(timeout + REPLY_SECONDS)
                answer, reason = connection.makefile("rb").readline(300), "no answer"
        except OSError as error:
            answer, reason = b"", str(error)
        if answer == b"go\n":
            return
        if answer == b"stop\n":
            raise TimeoutError(
                f"process {job.process_id} on {this_host()} reached process 0 at "
                f"{job.address}, but other processes are missing; process 0 names them."
            )
        time.sleep(0.2)
    raise TimeoutError(
        f"process {job.process_id} on {this_host()} could not reach process 0 at "
        f"{job.address} within {timeout} s ({reason}); check that the host is running and "
        f"reachable at this port, or set {INITIALIZATION_TIMEOUT} to more seconds."
    )
