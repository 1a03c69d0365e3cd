"""A folder of transformers grows into one that transformers runs, a few tensors at a time."""

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
    """The command."""
    return functools.partial(run_main, grow.main)


ONE_OF_EACH = (
    "llama, all heads, tied, llama 3 rope",
    "mistral, wide heads",
    "qwen2, one key, tied",
    "qwen3",
)


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def folder(request, tmp_path_factory):
    """A folder of each family, in several files."""
    return folders.write(tmp_path_factory.mktemp("folder"), request.param, num_shards=8)


# Every family grows in both ways, and every operator some of them.
SAME = [
    (name, growth)
    for i, name in enumerate(ONE_OF_EACH)
    for j, growth in enumerate(EXACT)
    if (i + j) % 2
]


@pytest.mark.parametrize(("folder", "growth"), SAME, indirect=["folder"])
def test_a_grown_folder_computes_the_same_function(folder, growth, run, tmp_path):
    code, out, err = run(folder, tmp_path / "grown", "--growth", growth)
    assert (code, err) == (0, "")
    assert "keeps the function" in out
    found, expected = (folders.logits(path) for path in (tmp_path / "grown", folder))
    # Weights of 16 bits are rounded where a share is no power of two: 8 of them.
    narrow = {torch.float32: 2e-5, torch.bfloat16: 0.15}
    (dtype,) = {tensor.dtype for tensor in folders.weights(folder).values()}
    assert np.abs(found - expected).max() < narrow[dtype]
    assert {tensor.dtype for tensor in folders.weights(tmp_path / "grown").values()} == {dtype}


@pytest.mark.parametrize("growth", ["stack(2)", "layer_map(1-2*2-32)"])
def test_copied_layers_are_those_of_the_source_bit_for_bit(folder, growth, run, tmp_path):
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


@pytest.mark.parametrize("growth", ["stack(2)", "width_split(mlp=2, split=uneven)"])
def test_weights_of_float64_stay_as_exact_as_they_are(growth, run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama, float64")
    assert run(folder, tmp_path / "grown", "--growth", growth)[0] == 0
    before, after = folders.weights(folder), folders.weights(tmp_path / "grown")
    assert {tensor.dtype for tensor in after.values()} == {torch.float64}
    name = "model.layers.0.mlp.down_proj.weight"
    whole = after[name].reshape(16, -1, 20).sum(axis=1)
    # In float32 they would be off by 1e-8.
    np.testing.assert_allclose(whole, before[name], rtol=0, atol=1e-15)


def test_what_is_stacked_after_it_was_split_is_one_growth(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "qwen2")
    split, stack = "width_split(mlp=2, split=uneven)", "stack(2)"
    run(folder, tmp_path / "split", "--growth", split)
    run(tmp_path / "split", tmp_path / "both", "--growth", stack)
    run(folder, tmp_path / "once", "--growth", f"{split} + {stack}")
    folders.assert_same_weights(tmp_path / "both", tmp_path / "once")


def test_a_card_tells_the_lineage_and_the_total_compute(run, tmp_path):
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


def test_a_folder_tells_its_lineage(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    run(folder, tmp_path / "grown", "--growth", "stack(2)", "--source-tokens", "1e9")
    said = inspect(InspectConfig(run=str(tmp_path / "grown")))
    first, second, total = (re.split("  +", line) for line in said.splitlines()[2:])
    assert (first[1], first[3], first[6]) == ("-", "1.00B", "from folder")
    assert second[1] == "stack(2)"
    assert total[1] == "1.00B"


def test_a_card_says_what_is_not_known(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    assert run(folder, tmp_path / "grown", "--growth", "stack(2)")[0] == 0
    assert "is not known here" in (tmp_path / "grown" / "README.md").read_text()


WRONG = {
    "masks": (("--growth", "depth_random(factor=2, mask_tokens=8)"), "works only inside a run"),
    "moments": (
        ("--growth", "stack(2)", "--optimizer-state", "grow"),
        "optimizer_state is 'grow'",
    ),
    "heads": (("--growth", "width_split(embed=9/8)"), "does not divide model.embed_dim 18"),
    "layer": (("--growth", "layer_map(1-4)"), "names layer 4"),
}


@pytest.mark.parametrize(("args", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_one_line(args, said, run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    code, _, err = run(folder, tmp_path / "grown", *args)
    assert code == 2
    (line,) = err.splitlines()
    assert said in line
    assert not (tmp_path / "grown").exists()


def test_a_folder_is_not_written_into_a_bucket(run, tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    code, _, err = run(folder, "gs://bucket/grown", "--growth", "stack(2)")
    assert (code, err.count("\n")) == (2, 1)
    assert "gs://bucket/grown: Hugging Face folders" in err


def test_a_folder_that_tells_of_another_model_is_not_believed(run, tmp_path):
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
from stackjax.interop.folder import write_folder
from stackjax.interop.grow_folder import grown_infos, grown_tensors
from stackjax.interop.huggingface import read_folder, slots_by_kind


def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def grow(path, target):
    folder, growth = read_folder(Path(path)), parse_growth(sys.argv[3])
    infos = grown_infos(folder, growth)
    tensors = grown_tensors(folder, growth, infos, jax.random.key(0))
    Path(target).mkdir()
    write_folder(Path(target), {}, infos, tensors, LINEAGE)
    return infos


from stackjax.interop.folder import read_lineage

LINEAGE = read_lineage(read_folder(Path(sys.argv[1])))
grow(sys.argv[1], sys.argv[1] + ".grown")  # all of the code is loaded now
before, peak, done = anonymous(), [0], threading.Event()


def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
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
    for kind, stored in slots_by_kind(config).items():
        num_bytes = sum(held[slot.name].num_bytes for slot in stored)
        parameters[kind] = parameters.get(kind, 0) + num_bytes
print(peak[0] - before, max(parameters.values()))
"""


@pytest.mark.parametrize("growth", ["stack(2)", "width_split(embed=2, mlp=2, heads=2)"])
def test_memory_holds_one_parameter(growth, tmp_path):
    # Large enough for what the compiler takes, tens of megabytes, to be little.
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
