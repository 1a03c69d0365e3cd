"""A peer's process: compiles, warms up, then times steps on request.

    python -m scripts.peers.worker plain tiny

Each input line is a number of steps. Each output line is JSON: after the first step,
after the warm-up, and for each input line.
"""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from scripts.peers.peer import SHAPES, Peer
from stackjax.runtime.errors import UserError, one_line_errors

WARMUP_STEPS = 2


def main() -> None:
    """Runs the command line."""
    name, shape = sys.argv[1:]
    # Libraries may print, so answers use a separate stream.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with one_line_errors():
        peer = importlib.import_module(f"scripts.peers.{name}_peer").build(SHAPES[shape])
        serve(peer, sys.stdin, answers)


def serve(peer: Peer, requests: Iterable[str], answers: TextIO) -> None:
    """Answers every request with the time for this many steps.

    Raises:
      UserError: The loss does not fall.
    """
    state, loss = _run(peer, peer.state, 1)
    first = float(loss)
    _answer(answers, num_params=peer.num_params)
    state, loss = _run(peer, state, WARMUP_STEPS)
    if not (math.isfinite(first) and float(loss) < first):
        raise UserError(f"the loss went from {first} to {float(loss)}; it must fall.")
    _answer(answers, losses=[first, float(loss)])
    for request in requests:
        # Other processes have left the caches cold.
        state, _ = _run(peer, state, 1)
        start = time.perf_counter()
        state, loss = _run(peer, state, int(request))
        seconds = time.perf_counter() - start
        _answer(answers, seconds=seconds, loss=float(loss), peak_rss_mb=_peak_rss_mb())


def _run(peer: Peer, state: Any, num_steps: int) -> tuple[Any, Any]:
    """Returns state and loss after some steps, both computed."""
    loss = None
    for _ in range(num_steps):
        state, loss = peer.step(state, peer.batch)
    peer.wait(state)
    return state, loss


def _answer(answers: TextIO, **fields: Any) -> None:
    print(json.dumps(fields), file=answers, flush=True)


def _peak_rss_mb() -> float:
    # getrusage would start from the parent's peak.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
