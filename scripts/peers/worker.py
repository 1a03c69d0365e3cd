"""One peer in a process of its own: compiles, warms up, then times steps when told to.

    python -m scripts.peers.worker plain tiny

Each line of input is a number of steps. Each line of output is JSON: one after the first step,
one after the warm-up, and one for each line of input.
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
    # Libraries print as they like, so the answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with one_line_errors():
        peer = importlib.import_module(f"scripts.peers.{name}_peer").build(SHAPES[shape])
        serve(peer, sys.stdin, answers)


def serve(peer: Peer, requests: Iterable[str], answers: TextIO) -> None:
    """Answers every request with the seconds that so many steps took.

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
        # What other processes did has left the caches cold.
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
    # Not getrusage, which starts from the peak of the process that started this one.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
