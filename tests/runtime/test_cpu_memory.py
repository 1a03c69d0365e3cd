"""Memory reuse between train steps on a CPU."""

import subprocess
import sys

import pytest

# Prints the temporary bytes, and the page faults per step.
STEPS = """
import ctypes, resource, statistics
import jax, jax.numpy as jnp
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: all pages have 4 KiB
{prepare}
def step(x):
    big = jnp.sin(x[:, :1] + x[None, :, 0])
    return big @ x + jnp.cos(big).T @ x
x = jnp.ones((4608, 8))
step = jax.jit(step).lower(x).compile()
faults = []
for _ in range(25):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The first steps may still get new memory from malloc.
print(step.memory_analysis().temp_size_in_bytes, int(statistics.median(faults[12:])))
"""
KEEP = "from stackjax.runtime.cpu_memory import keep_memory; keep_memory()"

RELEASE = """
import psutil
from stackjax.runtime.cpu_memory import release_memory
resident = psutil.Process().memory_info().rss
release_memory()
print(resident - psutil.Process().memory_info().rss)
"""


def numbers(code: str) -> list[int]:
    """Returns the numbers printed by a separate process."""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return [int(number) for number in ended.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "tunables", "is_reused"),
    [
        (KEEP, None, True),
        ("", None, False),
        # The user's malloc options take precedence.
        (KEEP, "glibc.malloc.mmap_threshold=1048576", False),
        (KEEP, "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184", True),
    ],
)
def test_steps_reuse_memory_unless_malloc_options_are_set(
    prepare, tunables, is_reused, monkeypatch
):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    temporary, faults = numbers(STEPS.format(prepare=prepare))
    assert temporary > 2**27, "smaller arrays fit into the arena of a thread"
    pages = temporary / 4096
    assert faults < pages / 50 if is_reused else faults > pages / 2


@pytest.mark.slow
def test_kept_memory_can_be_released(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    temporary, _, released = numbers(STEPS.format(prepare=KEEP) + RELEASE)
    assert released > temporary / 2
