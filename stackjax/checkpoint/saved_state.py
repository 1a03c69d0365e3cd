"""The state in a checkpoint, with a checksum per array."""

import contextlib
import functools
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from stackjax.checkpoint.checksums import WORDS, by_path, checksums
from stackjax.checkpoint.contents import Contents, from_json
from stackjax.files.json_file import parse_object
from stackjax.runtime.errors import UserError
from stackjax.sharding.host_memory import on_device
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import abstract_state
from stackjax.training.phase import Phase
from stackjax.training.train_state import TrainState

T = TypeVar("T")

_CHECKSUMS = "checksums"
_DESCRIPTION = "_CHECKPOINT_METADATA"
"""Orbax's file with the checkpoint description."""
_MAX_REASON = 300


class DamagedError(UserError):
    """A checkpoint is unreadable, or differs from the saved bits."""


def to_save(state: TrainState) -> dict[str, Any]:
    """Returns the tree for a checkpoint: the state and the checksums.

    The state may be donated afterwards, because the checksums are already enqueued.
    """
    tree = on_device(saved_tree(state))
    return tree | {_CHECKSUMS: checksums(tree)}


def saved_tree(state: TrainState) -> dict[str, Any]:
    """Returns a state's parts by name, with None in place of empty arrays.

    The arrays of 0 layers are empty, and Orbax does not save empty arrays.
    """
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, _parts(state))


def _parts(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in vars(state).items() if value is not None}


def array_types(tree: Any) -> dict[str, str]:
    """Returns types and shapes such as `float32[64, 256]`, by paths such as `params.head`.

    Empty arrays are left out.
    """
    leaves = by_path(tree).items()
    return {
        path: f"{leaf.dtype}{[*leaf.shape]}" for path, leaf in leaves if 0 not in leaf.shape
    }


def read_contents(checkpoint: epath.Path) -> Contents:
    """Returns the description of the state in a checkpoint.

    Raises:
      DamagedError: The checkpoint is unreadable.
    """

    def read() -> Contents:
        # Orbax would open every array as well, which takes milliseconds each.
        fields = parse_object((checkpoint / _DESCRIPTION).read_bytes())
        return from_json(fields.get("custom_metadata"))

    return _read(checkpoint, read)


def read_array_types(checkpoint: epath.Path) -> dict[str, str]:
    """Returns the `array_types` of the state in a checkpoint; opens every array.

    Raises:
      DamagedError: The checkpoint is unreadable.
    """

    def read() -> dict[str, str]:
        found: Any = ocp.metadata(checkpoint).metadata
        if found is None:
            raise UserError("its files do not say which arrays it holds")
        return array_types({name: part for name, part in found.items() if name != _CHECKSUMS})

    return _read(checkpoint, read)


def load_state(
    checkpoint: epath.Path,
    saved: dict[str, str],
    abstract: TrainState,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Returns the state in a checkpoint, or a part of it, laid out over `mesh`.

    Args:
      saved: The `array_types` of the whole state.
      abstract: Shapes, types and partitions; the optimizer state may be None.

    Raises:
      DamagedError: The checkpoint is unreadable, or a checksum differs.
    """
    tree = saved_tree(abstract)
    table = jax.ShapeDtypeStruct((len(saved), WORDS), np.uint32)
    context = ocp.Context()
    context.pytree.loading.partial_load = True

    def read() -> dict[str, Any]:
        with context:
            return ocp.load(checkpoint, on_mesh(tree | {_CHECKSUMS: table}, mesh))

    loaded: Any = _read(checkpoint, read)
    expected = dict(zip(sorted(saved), np.asarray(loaded.pop(_CHECKSUMS)), strict=True))
    found = zip(by_path(loaded), np.asarray(checksums(loaded)), strict=True)
    wrong = [path for path, words in found if (words != expected[path]).any()]
    if wrong:
        del loaded  # Another checkpoint may be read next, in the same memory.
        more = f", nor do {len(wrong) - 1} others" if len(wrong) > 1 else ""
        raise DamagedError(
            f"{checkpoint} is damaged: {wrong[0]} does not match its checksum{more}"
        )

    def with_empty(leaf: Any, found: Any) -> jax.Array:
        empty = found is None
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) if empty else found

    whole = jax.tree.map(with_empty, on_mesh(_parts(abstract), mesh), loaded)
    return TrainState(**({"opt_state": None} | whole))


def _read(checkpoint: epath.Path, read: Callable[[], T]) -> T:
    """Returns `read()`; DamagedError after a failure."""
    with _quiet_tasks():
        try:
            return read()
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises various types, even `Exception` itself.
            reason = _reason(error)
        gc.collect()  # Forgotten tasks complain when freed.
    _ignore_late_reads()
    raise DamagedError(f"{checkpoint} is damaged: {reason}")


@contextlib.contextmanager
def _quiet_tasks() -> Iterator[None]:
    """Silences tracebacks from further failed reads.

    All arrays are read at once, and every failed read would print a traceback.
    """
    disabled, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logging.disable(disabled)
        sys.unraisablehook = hook


def _ignore_late_reads() -> None:
    """Silences reads that end after the event loop was closed by a failed read.

    TensorStore continues other reads, and reports each to the closed loop.
    """
    hook = sys.unraisablehook
    if getattr(hook, "func", None) is not _without_late_reads:
        sys.unraisablehook = functools.partial(_without_late_reads, hook)


def _without_late_reads(hook: Callable[[Any], Any], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


def _reason(error: BaseException) -> str:
    """Returns an error's cause as a short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


def compile_checksums(phase: Phase) -> None:
    """Compiles the checksums for a phase's state, for the first save."""
    mesh = build_mesh(phase.mesh)
    with jax.set_mesh(mesh):
        checksums.lower(saved_tree(on_mesh(abstract_state(phase), mesh))).compile()
