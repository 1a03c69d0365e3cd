"""Imported lit-gpt checkpoints match transformers."""

import pickle
import re
from pathlib import Path

import folders
import jax
import numpy as np
import pytest
import torch

from stackjax import model
from stackjax.convert import main
from stackjax.inference import convert
from stackjax.inference.saved_model import open_model
from stackjax.interop.litgpt import read_litgpt
from stackjax.options import ConvertConfig

CASES = {
    "one group": {"num_key_value_heads": 1},
    "groups": {},
    "all heads": {"num_key_value_heads": 4},
    "bfloat16": {},
}


def lit_state(folder: Path, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Returns LLaMA weights in the lit-gpt layout: q, k and v fused and grouped by key head."""
    state, tensors = {}, folders.weights(folder)
    state["transformer.wte.weight"] = tensors["model.embed_tokens.weight"]
    state["transformer.ln_f.weight"] = tensors["model.norm.weight"]
    state["lm_head.weight"] = tensors["lm_head.weight"]
    for i in range(folders.SIZES["num_hidden_layers"]):
        theirs, lit = f"model.layers.{i}.", f"transformer.h.{i}."
        q, k, v = (tensors[f"{theirs}self_attn.{name}_proj.weight"] for name in ("q", "k", "v"))
        head_dim, rows = len(q) // num_heads, []
        for group in range(num_kv_heads):
            queries = num_heads // num_kv_heads
            for head in range(group * queries, (group + 1) * queries):
                rows += list(q[head * head_dim : (head + 1) * head_dim])
            rows += list(k[group * head_dim : (group + 1) * head_dim])
            rows += list(v[group * head_dim : (group + 1) * head_dim])
        state[f"{lit}attn.attn.weight"] = torch.stack(rows)
        for name, other in {
            "norm_1": "input_layernorm",
            "attn.proj": "self_attn.o_proj",
            "norm_2": "post_attention_layernorm",
            "mlp.swiglu.w1": "mlp.gate_proj",
            "mlp.swiglu.w2": "mlp.up_proj",
            "mlp.swiglu.w3": "mlp.down_proj",
        }.items():
            state[f"{lit}{name}.weight"] = tensors[f"{theirs}{other}.weight"]
    return state


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A Hugging Face folder, and the same weights in a `.pth` file."""
    path = tmp_path_factory.mktemp("prts")
    kind = "llama, bfloat16" if request.param == "bfloat16" else "llama"
    fields = {"rms_norm_eps": 1e-5} | CASES[request.param]
    folder = folders.write(path / "folder", kind, **fields)
    num_kv_heads = fields.get("num_key_value_heads", 2)
    state = lit_state(folder, folders.SIZES["num_attention_heads"], num_kv_heads)
    torch.save({"model": state, "iter_num": 5000}, path / "model.pth")
    return folder, path / "model.pth"


def test_converted_checkpoint_matches_transformers(case, tmp_path):
    folder, file = case
    target = tmp_path / "checkpoint"
    convert.convert(ConvertConfig(source=str(file), target=str(target), head_dim=4))
    saved = open_model(str(target))
    mesh = jax.make_mesh((1, 1, 1), ("replica", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        params = jax.tree.map(np.asarray, saved.load_params(saved.model, mesh))
    tokens = folders.tokens()
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    run = jax.jit(model.apply, static_argnums=0)
    logits = run(saved.model, params, tokens, positions, None)[..., : folders.VOCAB]
    np.testing.assert_allclose(logits, folders.logits(folder), rtol=0, atol=1e-5)
    assert saved.contents.lineage[0].code == f"from {file.name}"


def test_tensors_equal_transformers_exactly(case):
    folder, file = case
    found, expected = read_litgpt(file, head_dim=4).tensors, folders.weights(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        value = found.read(name)
        np.testing.assert_array_equal(value.astype(np.float32), tensor.float().numpy())


def write_damaged(name, state, path):
    if name == "code":
        path.write_bytes(pickle.dumps(Bomb(path.parent / "it_ran")))
    elif name == "code in a state":
        torch.save({"model": state, "more": Bomb(path.parent / "it_ran")}, path)
    elif name == "not a torch file":
        path.write_bytes(b"text")
    elif name == "cut":
        torch.save({"model": state}, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif name == "another model":
        torch.save({"model": {"weight": torch.zeros(2)}}, path)
    elif name in CHANGES:
        torch.save({"model": state | CHANGES[name]}, path)
    else:
        torch.save({"model": state}, path)


TABLE, NORM = "transformer.wte.weight", "transformer.ln_f.weight"
CHANGES = {
    "larger than the file": {TABLE: torch.zeros(1).expand(2**40, 16)},
    "bytes": {NORM: torch.ones(16, dtype=torch.int8)},
    "sparse": {NORM: torch.ones(16).to_sparse()},
    "a vector": {TABLE: torch.ones(16)},
    "a number as name": {5: torch.ones(16)},
    "a far layer": {"transformer.h.999999999.norm_1.weight": torch.ones(16)},
    "a huge layer number": {"transformer.h." + "9" * 5000 + ".norm_1.weight": torch.ones(16)},
}


class Bomb:
    """Creates a file when unpickled as code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


REFUSED = {
    "code": "holds more than tensors; no code was run",
    "code in a state": "holds more than tensors; no code was run",
    "not a torch file": "is damaged, or holds more than tensors",
    "cut": "is damaged, or holds more than tensors",
    "another model": "is not a lit-gpt LLaMA checkpoint",
    "larger than the file": r"wte\.weight .* has shape \[1099511627776, 16\]",
    "bytes": r"ln_f\.weight in .* is of type int8",
    "sparse": r"ln_f\.weight in .* is torch\.sparse_coo on cpu",
    "a vector": r"no matrix transformer\.wte\.weight",
    "a number as name": "has a tensor with the name 5",
    "a far layer": "model.pth",
    "a huge layer number": "model.pth",
    "unknown width": r"has 16 channels.* --head-dim",
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", REFUSED)
def test_damaged_file_is_one_line_and_runs_no_code(name, tmp_path, run_main):
    folder = folders.write(tmp_path / "folder", "llama")
    write_damaged(name, lit_state(folder, 4, 2), tmp_path / "model.pth")
    args = [] if name == "unknown width" else ["--head-dim", "4"]
    code, _, error = run_main(main, tmp_path / "model.pth", tmp_path / "target", *args)
    assert (code, error.count("\n")) == (2, 1)
    assert re.search(REFUSED[name], error), error
    assert not (tmp_path / "it_ran").exists()
    assert not (tmp_path / "target").exists()


def test_non_finite_weights_are_refused_by_default(tmp_path):
    state = lit_state(folders.write(tmp_path / "folder", "llama"), 4, 2)
    torch.save({"model": state | {NORM: torch.full((16,), torch.nan)}}, tmp_path / "model.pth")
    fields = {"source": str(tmp_path / "model.pth"), "head_dim": 4}
    with pytest.raises(ValueError, match=r"model\.norm\.weight in .* has NaN or infinity"):
        convert.convert(ConvertConfig(target=str(tmp_path / "target"), **fields))
    assert not (tmp_path / "target").exists()
    wanted = ConvertConfig(target=str(tmp_path / "b"), allow_nonfinite=True, **fields)
    assert convert.convert(wanted).exists()


def test_wrong_head_dim_is_refused(case):
    _, file = case
    with pytest.raises(ValueError, match="heads of 3 channels do not fit 16 channels"):
        read_litgpt(file, head_dim=3)


def test_verify_is_refused_for_litgpt_files(case, tmp_path):
    _, file = case
    config = ConvertConfig(source=str(file), target=str(tmp_path / "x"), verify=True)
    with pytest.raises(ValueError, match="verify is set"):
        convert.convert(config)
