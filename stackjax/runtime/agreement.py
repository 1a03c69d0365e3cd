"""Agreement between a run's processes: process 0 decides, and all run the same program."""

import hashlib
import importlib.metadata
import itertools
import os
import pickle
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src import distributed  # JAX's key-value store has no public name

from stackjax.runtime.cluster import this_host
from stackjax.runtime.errors import UserError

T = TypeVar("T")

_TIMEOUT_MS = 24 * 3_600_000
"""Timeout for a value from process 0. If process 0 dies, JAX ends the others much sooner."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_JAX_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl")
_SHOWN = 3
"""Maximum number of fields in a message."""

_calls = itertools.count()
"""Numbers the exchanges. All processes make the same exchanges in the same order."""


def from_process_0(read: Callable[[], T]) -> T:
    """Returns the result of `read` in process 0 to every process.

    Only process 0 calls `read`: a file on a shared disk may look different on every host.

    Raises:
      UserError, OSError: `read` failed in process 0. Every process raises the same error.
    """
    this = distributed.global_state
    if this.client is None:
        return read()
    key = f"stackjax/process_0/{next(_calls)}"
    if this.process_id == 0:
        outcome = _outcome(read)
        this.client.key_value_set_bytes(key, pickle.dumps(outcome))
    else:
        outcome = pickle.loads(this.client.blocking_key_value_get_bytes(key, _TIMEOUT_MS))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _outcome(read: Callable[[], Any]) -> Any:
    """Returns the result of `read`, or the error if the user can fix it."""
    try:
        return read()
    except (UserError, OSError) as error:
        return error


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Checks that all processes have the same settings.

    Raises:
      UserError: Some processes differ. Every process raises the same error, with the name of a
        process, a host and the fields.
    """
    this = distributed.global_state
    client = this.client
    if client is None:
        return
    expected, reference = from_process_0(lambda: (dict(settings), this_host()))
    key = f"stackjax/agreement/{next(_calls)}"
    differences = _differences(expected, settings)
    if differences:
        differences = f"process {this.process_id} on {this_host()} has {differences}"
    client.key_value_set(f"{key}/{this.process_id}", differences)

    def collect() -> list[str]:
        keys = [f"{key}/{process}" for process in range(this.num_processes or 1)]
        found = [client.blocking_key_value_get(each, _TIMEOUT_MS) for each in keys]
        return [each for each in found if each]

    differing = from_process_0(collect)
    if differing:
        others = f" ({len(differing)} processes differ)" if len(differing) > 1 else ""
        raise UserError(
            f"{differing[0]}, unlike process 0 on {reference}{others}; start the same command "
            f"with the same files and packages on every host."
        )


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Returns the differing fields with both values, or an empty text."""
    names = [
        name
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    shown = [f"{name} {found.get(name)!r}, not {expected.get(name)!r}" for name in names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(shown[:_SHOWN]) + more


def program() -> dict[str, str]:
    """Returns the code hash, package versions and compiler options of this process."""
    return {
        "stackjax's code": _code_digest()[:12],
        "Python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
        **{name: os.environ.get(name, "") for name in _VARIABLES},
        **{name: str(getattr(jax.config, name)) for name in _JAX_OPTIONS},
    }


def _code_digest() -> str:
    """Returns a hash of the package's source files."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
