"""Programs compiled for described devices; needs XLA's GPU compiler, but no GPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from stackjax.accelerators.topology import _PLUGINS, _is_installed

HAS_COMPILER = any(map(_is_installed, _PLUGINS)) and importlib.util.find_spec("nvidia.cudnn")
OPTIONS = [
    *("--model.head-dim", "64", "--data.seq-len", "256", "--stages.0.batch-size", "16"),
    *("--stages.1.batch-size", "16", "--stages.1.accumulate", "2", "--model.remat", "dots"),
]


@pytest.mark.skipif(not HAS_COMPILER, reason="XLA's GPU compiler and cuDNN are not installed")
def test_tiny_run_compiles_for_a_described_gpu(tmp_path):
    output = tmp_path / "fit.json"
    command = [sys.executable, "-m", "stackjax.fit", "--config", "configs/tiny.py", *OPTIONS]
    command += ["--devices", "h100:8", "--json", str(output)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = {each["name"]: each for each in json.loads(output.read_text())["programs"]}
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
