"""Environment variables to compile for devices that are not present."""

import os


def expect_no_devices() -> None:
    """Keeps JAX on the CPU, and libtpu from looking for a TPU. Call this before JAX starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Otherwise libtpu waits for a metadata server, and allows a single process per machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
