"""Programs compiled for described devices; needs their compilers, but no device."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stackjax.accelerators.topology import _PLUGINS, _is_installed

HAS_GPU = any(map(_is_installed, _PLUGINS)) and importlib.util.find_spec("nvidia.cudnn")
HAS_TPU = _is_installed("libtpu")
for_gpu = pytest.mark.skipif(not HAS_GPU, reason="XLA's GPU compiler, cuDNN are not installed")
for_tpu = pytest.mark.skipif(not HAS_TPU, reason="libtpu is not installed")
OPTIONS = [
    *("--model.head-dim", "64", "--data.seq-len", "256", "--stages.0.batch-size", "16"),
    *("--stages.1.batch-size", "16", "--stages.1.accumulate", "2", "--model.remat", "dots"),
]


def fit(config: str, devices: str, output: Path, *options: str) -> dict[str, dict]:
    """Returns the programs that the command reports, by name."""
    command = [sys.executable, "-m", "stackjax.fit", "--config", config, *options]
    command += ["--devices", devices, "--json", str(output)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {each["name"]: each for each in json.loads(output.read_text())["programs"]}


def synchronous_gigabytes(program: dict, kind: str) -> float:
    return sum(
        each["wire_bytes"] / 1e9
        for each in program["costs"]["collectives"]
        if each["is_synchronous"] and each["kind"] == kind
    )


# Devices, peak GiB, and GB of the whole step: synchronous communication, and memory traffic of
# elementwise operations. The v5p slice gathers weights synchronously (71 GB). With activations
# and rotary positions outside of the products, TPUs would have twice the traffic.
LARGE = [
    pytest.param("h100:8", 24, 0.001, 3300, marks=for_gpu),
    pytest.param("v5p:2x2x2", 31, 75, 2300, marks=for_tpu),
]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "peak", "synchronous", "elementwise"), LARGE)
def test_large_step_keeps_its_bounds_on_memory_communication_and_traffic(
    devices, peak, synchronous, elementwise, tmp_path
):
    found = fit("configs/scratch_1b.py", devices, tmp_path / "fit.json")
    step = found["stage 0 step"]
    assert step["fits"] and step["peak_bytes"] < peak * 2**30
    # Attention runs forward once in each of 24 layers and 16 microbatches.
    assert step["costs"]["forward_kernels"] == 24 * 16
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    waits = {kind: synchronous_gigabytes(step, kind) for kind in kinds}
    assert sum(waits.values()) < synchronous
    assert step["costs"]["elementwise_traffic"] < elementwise * 1e9
    assert waits["all-reduce"] < 0.1, "gradients of weights are not summed as a whole"


@for_tpu
@pytest.mark.parametrize(
    ("devices", "shape"),
    [
        ("v5e:8x8", (2, 32, 1, 1)),
        ("v5e:16x16*2", (16, 32, 1, 1)),
        ("v6e:8x8", (2, 32, 1, 1)),
        ("v6e:16x16", (8, 32, 1, 1)),
        ("v5p:2x2x2", (1, 8, 1, 1)),
        ("v5p:8x8x4", (8, 32, 1, 1)),
    ],
)
def test_default_mesh_forms_on_every_slice(devices, shape):
    script = "import sys; from stackjax.accelerators.fit import describe_machine as describe; "
    script += "from stackjax.sharding.mesh import MeshConfig, build_mesh; "
    script += "print(build_mesh(MeshConfig(), describe(sys.argv[1]).devices).devices.shape)"
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", script, devices]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip().endswith(str(shape)), done.stderr


@for_gpu
def test_tiny_run_compiles_for_a_described_gpu(tmp_path):
    found = fit("configs/tiny.py", "h100:8", tmp_path / "fit.json", *OPTIONS)
    assert [*found] == [
        *("stage 0 step", "stage 0 evaluation"),
        *("stage 1 growth", "stage 1 step", "stage 1 evaluation"),
    ]
    assert all(each["fits"] for each in found.values())
    step = found["stage 1 step"]
    assert (step["compute_dtype"], step["attention"]) == ("bfloat16", "cudnn")
    # 12 layers, 2 microbatches, and no second forward pass of attention.
    assert step["costs"]["forward_kernels"] == 12 * 2
    kinds = {each["kind"] for each in step["costs"]["collectives"]}
    assert {"all-gather", "all-reduce"} <= kinds and step["costs"]["unknown_loops"] == 0
    # The backward kernel computes attention scores again; nothing else is computed twice.
    executed = step["costs"]["dot_flops"] + step["costs"]["attention_flops"]
    assert 1.0 < executed / step["model_flops"] < 1.25
