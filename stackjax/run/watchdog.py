"""Late hosts: each process reports how long its own part of a step takes."""

import faulthandler
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from jax._src import distributed  # JAX's key-value store has no public name

from stackjax.runtime.cluster import this_host

LATE = 1.5
"""A late host takes more than this multiple of the median host's time."""
_LEAST_SHARE = 0.5
"""A late host's own part is at least this share of the step: then the others wait for it."""


def late_hosts(own: Sequence[float], step: float) -> list[int]:
    """Returns the late processes.

    Args:
      own: Seconds per step by process, without waiting for devices.
      step: Seconds per step.
    """
    limit = max(LATE * statistics.median(own), _LEAST_SHARE * step)
    return [process for process, seconds in enumerate(own) if seconds > limit]


class Watchdog:
    """Compares the processes' own seconds per step; does nothing in a single process.

    Reports travel through JAX's key-value store, so no step waits for them.
    """

    def __init__(self):
        self._number = 0

    def report(self, own: float, step: float) -> tuple[dict[str, Any], str] | None:
        """Sends this process's seconds per step, and compares the reports before.

        Args:
          own: Seconds per step, without waiting for devices.
          step: Seconds per step.

        Returns:
          In process 0 a row's values and a line, if a host was late; else None.
        """
        this = distributed.global_state
        if this.client is None or (this.num_processes or 1) == 1:
            return None
        self._number += 1
        mine = json.dumps([own, step, this_host()])
        this.client.key_value_set(f"{_key(self._number)}{this.process_id}", mine)
        if this.process_id != 0 or self._number == 1:
            return None
        # By now the other processes have sent the report before.
        before = _key(self._number - 1)
        found = dict(this.client.key_value_dir_get(before))
        this.client.key_value_delete(before)
        reports = {int(key.rpartition("/")[2]): json.loads(found[key]) for key in found}
        if len(reports) < (this.num_processes or 1):
            return None
        seconds, steps, hosts = zip(*(reports[key] for key in sorted(reports)), strict=True)
        return _comparison(seconds, steps[0], hosts)


def _comparison(
    own: Sequence[float], step: float, hosts: Sequence[str]
) -> tuple[dict[str, Any], str] | None:
    """Returns a row's values and a line about the late processes, if any."""
    late = late_hosts(own, step)
    if not late:
        return None
    median = statistics.median(own)
    named = ", ".join(f"process {each} on {hosts[each]} ({own[each]:.3g} s)" for each in late)
    line = (
        f"late: {named}, without waiting for devices; the median is {median:.3g} s and a step "
        f"takes {step:.3g} s"
    )
    return {"late": late, "seconds_by_process": list(own), "step_seconds": step}, line


def _key(number: int) -> str:
    return f"stackjax/watchdog/{number}/"


def expect_step(seconds: float | None) -> None:
    """Prints all stacks to stderr if no other step is expected within some seconds.

    Args:
      seconds: None to expect nothing.
    """
    if seconds is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(seconds, file=sys.__stderr__ or sys.stderr)
