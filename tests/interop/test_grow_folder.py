"""Grown Hugging Face folders: logits, model cards, lineage, errors and memory."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import folders
import numpy as np
import pytest
import torch

from stackjax import grow
from stackjax.growth import parse_growth
from stackjax.inference.lineage_table import inspect
from stackjax.interop.huggingface import read_folder
from stackjax.model.flops import flops_6nd
from stackjax.options import InspectConfig

EXACT = (
    "depth_zero(factor=2)",
    "depth_zero(factor=2, order=stack, rest=fresh)",
    "width_split(embed=2, mlp=2, heads=2, split=uneven)",
    "width_split(embed=2, mlp=3/2, heads=2, noise=0.3) + depth_zero(2)",
    "width_zero(embed=2, mlp=2, heads=2)",
)


@pytest.fixture
def run(run_main):
    """Runs `grow`; returns exit code, stdout and stderr."""
    return functools.partial(run_main, grow.main)


FAMILIES = (
    "llama, all heads, tied, llama 3 rope",
    "mistral, wide heads",
    "qwen2, one key, tied",
    "qwen3",
)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A folder of each family, in several weight files."""
    return folders.write(tmp_path_factory.mktemp("folder"), request.param, num_shards=8)


# Each family grows in depth and in width; each operator grows two families.
CASES = [
    (name, growth)
    for i, name in enumerate(FAMILIES)
    for j, growth in enumerate(EXACT)
    if (i + j) % 2
]


# Families with windows, other norms and scaled embeddings; here, whole periods fit.
CASES += [
    ("gemma2", "depth_zero(factor=2)"),
    ("gemma2", "width_split(embed=2, mlp=2, heads=2, split=uneven)"),
    ("gemma3, untied", "width_zero(embed=2, mlp=2, heads=2)"),
    ("olmo2", "width_split(embed=2, mlp=3/2, heads=2, noise=0.3) + depth_zero(2)"),
    ("olmo2", "width_zero(embed=2, mlp=2)"),
    ("qwen2, window in upper layers", "depth_zero(factor=2, order=stack, rest=fresh)"),
    ("gpt_neox", "width_split(embed=2, mlp=2, heads=2, split=uneven)"),
    ("gpt_neox, in turn, tied, yarn", "depth_zero(factor=2)"),
    ("gpt2", "width_split(embed=2, mlp=3/2, heads=2, noise=0.3) + depth_zero(2)"),
    ("gpt2, untied", "width_split(embed=2, mlp=2, heads=2)"),
    ("llama, biases", "width_zero(embed=2, mlp=2, heads=2)"),
    ("phi3", "width_split(embed=2, mlp=2, heads=2, split=uneven)"),
    ("phi3, partly rotary, window", "width_zero(embed=2, mlp=2, heads=2)"),
    ("smollm3, windows", "depth_zero(factor=2)"),
    ("qwen3, yarn", "width_split(embed=2, mlp=3/2, heads=2, noise=0.3) + depth_zero(2)"),
]


@pytest.mark.sample(6)
@pytest.mark.parametrize(("folder", "growth"), CASES, indirect=["folder"])
def test_exact_growth_keeps_the_logits(folder, growth, run, tmp_path):
    code, out, err = run(folder, tmp_path / "grown", "--growth", growth)
    assert (code, err) == (0, "")
    assert "keeps the function" in out
    found, expected = (folders.logits(path) for path in (tmp_path / "grown", folder))
    # bfloat16 weights are rounded if a share is not a power of two.
    tolerances = {torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.15}
    (dtype,) = {tensor.dtype for tensor in folders.weights(folder).values()}
    assert np.abs(found - expected).max() < tolerances[dtype]
    assert {tensor.dtype for tensor in folders.weights(tmp_path / "grown").values()} == {dtype}


@pytest.mark.sample(4)
def test_new_layers_join_a_folder_and_matrices_shrink(folder, run, tmp_path):
    growth = "shrink(0.5) + depth_fresh(2)"
    assert run(folder, tmp_path / "grown", "--growth", growth)[0] == 0
    before, after = folders.weights(folder), folders.weights(tmp_path / "grown")
    assert (
        read_folder(tmp_path / "grown").model.num_layers
        == 2 + read_folder(folder).model.num_layers
    )
    for name, tensor in before.items():
        # Half of a float is exact.
        torch.testing.assert_close(
            after[name], tensor / (1 + (tensor.ndim > 1)), rtol=0, atol=0
        )
    assert {tensor.dtype for tensor in after.values()} == {t.dtype for t in before.values()}


@pytest.mark.sample(3)
@pytest.mark.parametrize("growth", ["stack(2)", "layer_map(1-2*2-32)"])
def test_copied_layers_equal_source_layers_bit_for_bit(folder, growth, run, tmp_path):
    assert run(folder, tmp_path / "grown", "--growth", growth)[0] == 0
    sources = parse_growth(growth).axis_maps(read_folder(folder).model)["layers"].sources
    before, after = folders.weights(folder), folders.weights(tmp_path / "grown")
    for name, tensor in after.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        source = name
        if layer is not None:
            source = name.replace(f".{layer[1]}.", f".{sources[int(layer[1])]}.", 1)
        assert torch.equal(tensor, before[source]), name
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(sources)
    assert len(config.get("layer_types") or sources) == len(sources)
    assert folders.logits(tmp_path / "grown").shape[-1] == folders.VOCAB


@pytest.mark.parametrize("name", ["llama", "mistral, window", "olmo2"])
def test_list_of_layer_types_grows_with_the_layers(name, run, tmp_path):
    path = folders.write(tmp_path / "source", name)
    config = json.loads((path / "config.json").read_text())
    config |= {"layer_types": ["full_attention"] * 3}
    (path / "config.json").write_text(json.dumps(config))
    assert run(path, tmp_path / "grown", "--growth", "stack(2)")[0] == 0
    grown = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert len(grown["layer_types"]) == 6
    assert folders.logits(tmp_path / "grown").shape[-1] == folders.VOCAB


def test_growth_that_would_change_a_layers_window_is_refused(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "gemma2")
    code, _, error = run(folder, tmp_path / "grown", "--growth", "insert_block(size=1)")
    assert (code, error.count("\n")) == (2, 1)
    assert "makes layer 2 (counted from 0; window 5) from layer 1 (global)" in error
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("growth", ["stack(2)", "width_split(mlp=2, split=uneven)"])
def test_float64_weights_grow_in_float64(growth, run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama, float64")
    assert run(folder, tmp_path / "grown", "--growth", growth)[0] == 0
    before, after = folders.weights(folder), folders.weights(tmp_path / "grown")
    assert {tensor.dtype for tensor in after.values()} == {torch.float64}
    name = "model.layers.0.mlp.down_proj.weight"
    whole = after[name].reshape(16, -1, 20).sum(axis=1)
    # Float32 arithmetic would differ by 1e-8.
    np.testing.assert_allclose(whole, before[name], rtol=0, atol=1e-15)


def test_split_then_stack_equals_the_composed_growth(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "qwen2")
    split, stack = "width_split(mlp=2, split=uneven)", "stack(2)"
    run(folder, tmp_path / "split", "--growth", split)
    run(tmp_path / "split", tmp_path / "both", "--growth", stack)
    run(folder, tmp_path / "once", "--growth", f"{split} + {stack}")
    folders.assert_same_weights(tmp_path / "both", tmp_path / "once")


def test_model_card_has_lineage_and_total_compute(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("Of the small model.")
    args = ("--growth", "stack(2)", "--source-tokens", "1e9")
    assert run(folder, tmp_path / "once", *args)[0] == 0
    code, out, _ = run(tmp_path / "once", tmp_path / "twice", "--growth", "depth_zero(2)")
    assert code == 0
    assert "after 1,000,000,000 tokens" in out
    flops = 10**9 * flops_6nd(read_folder(folder).model)
    card = (tmp_path / "twice" / "README.md").read_text()
    assert "from folder" in card
    assert card.index("`stack(2)`") < card.index("`depth_zero(factor=2)`")
    assert f"| **total** | | | | | **1.00B** | **{flops:.3e}** | |" in card
    origin = json.loads((tmp_path / "twice" / "stackjax.json").read_text())
    depths = [generation["model"]["num_layers"] for generation in origin["lineage"]]
    assert depths == [3, 6, 12]
    assert (tmp_path / "twice" / "tokenizer.json").read_text() == "{}"


def test_inspect_prints_the_lineage_of_a_folder(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    run(folder, tmp_path / "grown", "--growth", "stack(2)", "--source-tokens", "1e9")
    printed = inspect(InspectConfig(run=str(tmp_path / "grown")))
    first, second, total = (re.split("  +", line) for line in printed.splitlines()[2:])
    assert (first[1], first[3], first[6]) == ("-", "1.00B", "from folder")
    assert second[1] == "stack(2)"
    assert total[1] == "1.00B"


def test_model_card_marks_unknown_source_tokens(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    assert run(folder, tmp_path / "grown", "--growth", "stack(2)")[0] == 0
    assert "is not known here" in (tmp_path / "grown" / "README.md").read_text()


def test_new_channels_in_a_layer_norm_are_refused(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "gpt_neox")
    for growth in ("width_zero(embed=2)", "width_split(embed=3/2)"):
        code, _, error = run(folder, tmp_path / "grown", "--growth", growth)
        assert (code, error.count("\n")) == (2, 1)
        assert "changes the mean in LayerNorm" in error
    assert not (tmp_path / "grown").exists()


REFUSED = {
    "masks": (("--growth", "depth_random(factor=2, mask_tokens=8)"), "works only inside a run"),
    "moments": (
        ("--growth", "stack(2)", "--optimizer-state", "grow"),
        "optimizer_state is 'grow'",
    ),
    "width": (("--growth", "width_split(embed=9/8)"), "does not divide model.embed_dim 18"),
    "layer": (("--growth", "layer_map(1-4)"), "names layer 4"),
}


@pytest.mark.parametrize(("args", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_growth_is_refused_in_one_line(args, message, run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    code, _, err = run(folder, tmp_path / "grown", *args)
    assert code == 2
    (line,) = err.splitlines()
    assert message in line
    assert not (tmp_path / "grown").exists()


def test_output_in_a_bucket_is_refused(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    code, _, err = run(folder, "gs://bucket/grown", "--growth", "stack(2)")
    assert (code, err.count("\n")) == (2, 1)
    assert "gs://bucket/grown: Hugging Face folders" in err


def test_lineage_of_another_model_is_refused(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    run(folder, tmp_path / "grown", "--growth", "stack(2)")
    (tmp_path / "grown" / "stackjax.json").replace(folder / "stackjax.json")
    code, _, err = run(folder, tmp_path / "again", "--growth", "stack(2)")
    assert code == 2
    assert "describes another model than config.json" in err


MEASURE = """
import sys, threading, time
from pathlib import Path

import jax

from stackjax.growth import parse_growth
from stackjax.interop.folder import read_lineage, write_folder
from stackjax.interop.grow_folder import grown_infos, grown_tensors
from stackjax.interop.huggingface import read_folder
from stackjax.interop.slots import slots_by_kind


def anonymous_memory():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def grow(path, target):
    folder, growth = read_folder(Path(path)), parse_growth(sys.argv[3])
    infos = grown_infos(folder, growth)
    tensors = grown_tensors(folder, growth, infos, jax.random.key(0))
    Path(target).mkdir()
    write_folder(Path(target), {}, infos, tensors, LINEAGE)
    return infos


LINEAGE = read_lineage(read_folder(Path(sys.argv[1])))
grow(sys.argv[1], sys.argv[1] + ".grown")  # loads all code first
before, peak, done = anonymous_memory(), [0], threading.Event()


def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_memory())
        time.sleep(0.001)


thread = threading.Thread(target=watch)
thread.start()
infos = grow(sys.argv[2], sys.argv[2] + ".grown")
done.set()
thread.join()
source, growth = read_folder(Path(sys.argv[2])), parse_growth(sys.argv[3])
parameters = {}
target = growth.target_config(source.model)
for config, held in ((source.model, source.tensors), (target, infos)):
    for kind, stored in slots_by_kind(config, source.model_type).items():
        num_bytes = sum(held[slot.name].num_bytes for slot in stored)
        parameters[kind] = parameters.get(kind, 0) + num_bytes
print(peak[0] - before, max(parameters.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("growth", ["stack(2)", "width_split(embed=2, mlp=2, heads=2)"])
def test_growth_holds_one_parameter_in_memory(growth, tmp_path):
    # Parameters are much larger than the compiler's tens of megabytes.
    sizes = {"vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2048}
    small = folders.write(tmp_path / "small", "llama")
    large = folders.write(tmp_path / "large", "llama", 16, num_hidden_layers=3, **sizes)
    assert len(list(large.glob("*.safetensors"))) >= 8
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large), growth],
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    held, parameter = map(int, out.split())
    # Source and target of the largest parameter, and a copy of the source.
    assert 0 < held < 2 * parameter
