"""Hugging Face folders: logits, exact round trips, unsupported models and damage."""

import dataclasses
import json
import re
import shutil

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from completep import standard, with_completep
from conftest import KINDS, MESHES, MODELS, mesh_of, random_params
from decoder import NumpyDecoder
from etils import epath
from safetensors.torch import save_file

from stackjax import model
from stackjax.checkpoint.contents import Contents
from stackjax.checkpoint.lineage import Generation
from stackjax.checkpoint.save import write_first
from stackjax.convert import main
from stackjax.growth import Stack
from stackjax.inference import convert
from stackjax.inference.lineage_table import inspect
from stackjax.inference.saved_model import SavedCheckpoint, model_of, open_model
from stackjax.inference.verify import verify
from stackjax.interop import config_json
from stackjax.interop.huggingface import load_params, read_folder
from stackjax.interop.stored_types import types_of
from stackjax.interop.tensors import INDEX
from stackjax.model.config import RopeScaling
from stackjax.model.layer_kind import LayerKind
from stackjax.options import ConvertConfig, GrowConfig, InspectConfig
from stackjax.run.grow import grow
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Counts
from stackjax.training.train_state import TrainState

TOKENS = folders.tokens()
POSITIONS = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)


@pytest.fixture(scope="module", params=[n for n in folders.FOLDERS if "float64" not in n])
def folder(request, tmp_path_factory):
    """Each folder in `FOLDERS`."""
    return folders.write(tmp_path_factory.mktemp("folder"), request.param)


def load(folder, name="one device"):
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        return load_params(folder, folder.model, mesh)


def load_arrays(folder):
    """Returns the parameters in a folder as numpy arrays."""
    return jax.tree.map(np.asarray, load(folder))


def write_checkpoint(path, config, params):
    """Writes an untrained model's checkpoint."""
    generation = Generation(
        stage=0, name="train", growth=None, model=config, spent=Counts(), code="test"
    )
    contents = Contents(Counts(), config, True, (generation,))
    state = TrainState(jnp.zeros((), jnp.int32), params, None)
    return write_first(epath.Path(path), state, contents)


def convert_model(source, target, **fields):
    config = ConvertConfig(source=str(source), target=str(target), **fields)
    return convert.convert(config)


@pytest.mark.sample(3)
def test_logits_match_transformers(folder):
    found = read_folder(folder)
    logits = jax.jit(model.apply, static_argnums=0)(
        found.model, load_arrays(found), TOKENS, POSITIONS, None
    )
    expected = folders.logits(folder)
    # Both sides compute in float32, even with narrower weights.
    np.testing.assert_allclose(
        logits[..., : folders.VOCAB], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_float64_logits_match_transformers(folder):
    found = read_folder(folder)
    segments = np.zeros_like(TOKENS)
    expected = folders.logits(folder, "float64")
    assert 0.3 < expected.std() < 3
    logits = NumpyDecoder(found.model, load_arrays(found)).logits(TOKENS, POSITIONS, segments)
    # transformers has float32 angles up to 24, with relative errors of 1 / 2^23.
    np.testing.assert_allclose(logits[..., : folders.VOCAB], expected, rtol=0, atol=2e-6)


@pytest.mark.sample(4)
def test_folder_round_trip_is_exact(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    convert_model(folder, tmp_path / "checkpoint")
    convert_model(tmp_path / "checkpoint", tmp_path / "back")
    folders.assert_same_weights(tmp_path / "back", folder)
    for name in ("config.json", "generation_config.json"):
        found, wanted = (
            json.loads((path / name).read_text()) for path in (tmp_path / "back", folder)
        )
        assert found == wanted
    for name in ("tokenizer.json", "LICENSE"):
        assert (tmp_path / "back" / name).read_text() == (folder / name).read_text()


def test_float64_weights_are_rounded_with_a_note(tmp_path, capsys):
    folder = folders.write(tmp_path / "folder", "llama, float64")
    convert_model(folder, tmp_path / "checkpoint", verify=True)
    printed = capsys.readouterr().out
    assert re.search("note .*float64.* float32", printed)
    assert float(printed.split("differ by at most ")[1].split()[0]) < 1e-5


def change_tensors(path, change):
    file = path / "model.safetensors"
    save_file(change(folders.weights(path)), file, {"format": "pt"})


WIDE = ("norm", "embed_tokens")


def mix(tensors):
    """Returns wide tensors in float32, a layer in float16, and all others unchanged."""
    return {
        name: tensor.float()
        if any(kind in name for kind in WIDE)
        else tensor.half()
        if ".1." in name
        else tensor
        for name, tensor in tensors.items()
    }


def test_round_trip_keeps_tensor_types(tmp_path):
    folder = folders.write(tmp_path / "folder", "llama, bfloat16")
    change_tensors(folder, mix)
    assert len({tensor.dtype for tensor in folders.weights(folder).values()}) == 3
    convert_model(folder, tmp_path / "checkpoint")
    convert_model(tmp_path / "checkpoint", tmp_path / "back")
    folders.assert_same_weights(tmp_path / "back", folder)
    found, wanted = (
        json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "back")
    )
    assert found == wanted
    convert_model(tmp_path / "checkpoint", tmp_path / "narrow", dtype="bfloat16")
    narrow = folders.weights(tmp_path / "narrow")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}


def test_new_tensor_gets_the_widest_type():
    stored = {"model.layers.0.a": "BF16", "model.layers.1.a": "F16", "norm": "BF16"}
    names = ("model.layers.0.a", "model.layers.2.a", "norm", "lm_head")
    assert types_of(names, stored) == dict(
        zip(names, ("BF16", "F32", "BF16", "F32"), strict=True)
    )


def test_overflow_of_the_export_type_is_refused_by_default(tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    norm = "model.norm.weight"
    change_tensors(folder, lambda tensors: tensors | {norm: tensors[norm] * 0 + 1e6})
    convert_model(folder, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"norm\.weight in .* has NaN or infinity as float16"):
        convert_model(tmp_path / "checkpoint", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    convert_model(
        tmp_path / "checkpoint", tmp_path / "half", dtype="float16", allow_nonfinite=True
    )
    assert folders.weights(tmp_path / "half")[norm].isinf().all()
    change_tensors(folder, lambda tensors: tensors | {norm: tensors[norm].double() * 1e300})
    with pytest.raises(ValueError, match=r"norm\.weight in .* has NaN or infinity as float32"):
        convert_model(folder, tmp_path / "second")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", ["llama, all heads, tied, llama 3 rope", "qwen3, tied, other base"]
)
@pytest.mark.parametrize("differs", [0, 1])
def test_stored_head_overrides_tie_word_embeddings(name, differs, tmp_path):
    folder = folders.write(tmp_path / "folder", name)
    embedding = folders.weights(folder)["model.embed_tokens.weight"]
    change_tensors(
        folder,
        lambda tensors: (
            tensors | {"lm_head.weight": embedding.flip(0) if differs else embedding.clone()}
        ),
    )
    found = read_folder(folder)
    assert found.model.tie_head == (not differs)
    assert model_of(str(folder)) == found.model
    logits = jax.jit(model.apply, static_argnums=0)(
        found.model, load_arrays(found), TOKENS, POSITIONS, None
    )
    np.testing.assert_allclose(
        logits[..., : folders.VOCAB], folders.logits(folder), rtol=0, atol=1e-5
    )
    fields = config_json.config_fields(found.model, None, found.fields, 0)
    assert fields["tie_word_embeddings"] == (not differs)


TRAINED = 100
LLAMA3_WITHOUT_LENGTH = {
    k: v for k, v in folders.LLAMA3.items() if k != "original_max_position_embeddings"
}
TEMPLATES = {
    "longer": ("llama", {"max_position_embeddings": 200}, 200),
    "shorter": ("llama", {"max_position_embeddings": 50}, TRAINED),
    "shorter, with scaled rope": (
        "llama",
        {"max_position_embeddings": 20, "rope_parameters": LLAMA3_WITHOUT_LENGTH},
        TRAINED,
    ),
    "window as long as the context": (
        "mistral",
        {"max_position_embeddings": 50, "sliding_window": 50},
        TRAINED,
    ),
    "window in upper layers": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 64}
        | {"max_position_embeddings": 50},
        TRAINED,
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_exported_context_covers_training_without_a_window(name):
    kind, changes, length = TEMPLATES[name]
    template = {"model_type": kind} | folders.SIZES | changes
    source = config_json.model_config(template)
    fields = config_json.config_fields(source, None, template, TRAINED)
    assert fields["max_position_embeddings"] == length
    assert config_json.model_config(fields) == source
    reference = transformers.CONFIG_MAPPING[kind].from_dict(fields)
    assert "sliding_attention" not in (getattr(reference, "layer_types", None) or ())
    assert getattr(reference, "sliding_window", None) is None or "window" not in name


def test_growth_adds_no_sliding_windows():
    template = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    template |= folders.SIZES | {"max_window_layers": 3, "max_position_embeddings": 64}
    source = config_json.model_config(template)
    grown = dataclasses.replace(source, num_layers=6)
    fields = config_json.config_fields(grown, None, template, 0)
    assert config_json.model_config(fields) == grown


SCALED = RopeScaling(factor=8.0, original_seq_len=32)
ARCHITECTURES = {
    "llama": MODELS["gqa"],
    "llama, tied, slowed": dataclasses.replace(
        MODELS["mqa, tied, slowed"], rope_scaling=SCALED, norm_epsilon=1e-4, rope_theta=500.0
    ),
    "qwen2": MODELS["mha, biases"],
    "qwen3": MODELS["gqa, tied, qk_norm"],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpoint_round_trip_is_exact(name, tmp_path, monkeypatch):
    config, mesh = ARCHITECTURES[name], mesh_of("one device")
    params = random_params(config)
    monkeypatch.setattr(SavedCheckpoint, "seq_len", 40)
    with jax.set_mesh(mesh):
        checkpoint = write_checkpoint(tmp_path / "first", config, params)
    convert_model(checkpoint, tmp_path / "folder", tokenizer="bytes")
    kind, *_ = name.split(",")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "folder").model_type == kind
    convert_model(tmp_path / "folder", tmp_path / "second")
    saved = open_model(str(tmp_path / "second"))
    expected = dataclasses.replace(config, scan_unroll=0, vocab_multiple=128)
    assert saved.model == expected
    with jax.set_mesh(mesh):
        found = saved.load_params(saved.model, mesh)
    for kind, table in params.items():
        if kind == "layers":
            jax.tree.map(np.testing.assert_array_equal, found[kind], table)
        else:
            true = tuple(slice(11 if size == 24 else None) for size in table.shape)
            np.testing.assert_array_equal(found[kind][true], table[true])


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export_under_completep_holds_the_factors(name, tmp_path, monkeypatch, capsys):
    config, mesh = with_completep(ARCHITECTURES[name]), mesh_of("one device")
    monkeypatch.setattr(SavedCheckpoint, "seq_len", 40)
    with jax.set_mesh(mesh):
        checkpoint = write_checkpoint(tmp_path / "first", config, random_params(config))
    assert "CompleteP 2 x 4" in inspect(InspectConfig(run=str(checkpoint)))
    grown = grow(
        GrowConfig(source=str(checkpoint), target=str(tmp_path / "grown"), growth=Stack(2))
    )
    assert open_model(str(grown)).model == dataclasses.replace(config, num_layers=6)
    for source, folder in ((checkpoint, "folder"), (grown, "grown folder")):
        convert_model(source, tmp_path / folder, tokenizer="bytes", verify=True)
        # Float32 rounding; logits are near 1.
        assert float(capsys.readouterr().out.split("differ by at most ")[1].split()[0]) < 1e-5
        imported = tmp_path / f"{folder}, imported"
        convert_model(tmp_path / folder, imported, verify=True)
        assert float(capsys.readouterr().out.split("differ by at most ")[1].split()[0]) < 1e-5
        assert open_model(str(imported)).model.completep is None


@pytest.mark.parametrize("completep", [False, True], ids=["standard", "completep"])
def test_looped_model_is_exported_with_a_layer_for_each_loop(
    completep, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(MODELS["gqa"], loops=2)
    config = with_completep(config) if completep else config
    params = random_params(config)
    monkeypatch.setattr(SavedCheckpoint, "seq_len", 40)
    with jax.set_mesh(mesh_of("one device")):
        checkpoint = write_checkpoint(tmp_path / "run", config, params)
    convert_model(checkpoint, tmp_path / "folder", tokenizer="bytes", verify=True)
    difference = re.search(r"differ by at most (\S+)", capsys.readouterr().out)
    # Float32 through six layers; logits are near 1.
    assert difference is not None and float(difference[1]) < 5e-5
    folder = read_folder(tmp_path / "folder")
    assert (folder.model.num_layers, folder.model.loops) == (6, 1)
    layers = (standard(config, params)[1] if completep else params)["layers"]
    for name, leaf in load_arrays(folder)["layers"].items():
        expected = np.concatenate([layers[name]] * 2)
        np.testing.assert_allclose(leaf, expected, rtol=1e-6 if completep else 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [4, 6])
def test_new_config_json_gives_the_head_dim_to_transformers(name, head_dim):
    config = dataclasses.replace(ARCHITECTURES[name], head_dim=head_dim)
    assert config.embed_dim == 4 * config.num_heads
    fields = config_json.config_fields(config, None, None, TRAINED)
    judge = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    assert getattr(judge, "head_dim", None) in (None, head_dim)
    assert config_json.model_config(fields).head_dim == head_dim


def test_config_json_of_another_model_is_refused():
    fields = config_json.config_fields(MODELS["gqa"], None, None, TRAINED)
    other = dataclasses.replace(MODELS["gqa"], rope_theta=5.0)
    with pytest.raises(UserError, match=r"llama .* model\.rope_theta is 5\.0, not 10000\.0"):
        config_json._check_same_model(other, fields)


@pytest.mark.sample(3)
@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("name", ["mistral, wide heads", "qwen2"])
def test_parameters_are_equal_on_every_mesh(name, mesh_name, tmp_path):
    found = read_folder(folders.write(tmp_path / "folder", name, num_shards=3))
    params, expected = load(found, mesh_name), load(found)
    mesh = mesh_of(mesh_name)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda: model.init(found.model, jax.random.key(0)))
    for leaf, whole, abstract in zip(
        *map(jax.tree.leaves, (params, expected, like)), strict=True
    ):
        np.testing.assert_array_equal(leaf, whole)
        assert leaf.sharding.spec == abstract.sharding.spec


def test_verify_reports_different_weights(tmp_path, capsys):
    folder = folders.write(tmp_path / "folder", "qwen3", num_shards=2)
    convert_model(folder, tmp_path / "checkpoint", verify=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "differ by" in line]
    assert "agrees at 100.00% of 256 positions" in line
    assert float(line.split("differ by at most ")[1].split()[0]) < 1e-5
    # `verify` reports a changed weight.
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = folders.weights(folder) | {name: folders.weights(folder)[name].flip(0)}
    shutil.rmtree(folder)
    network = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**folders.SIZES, head_dim=6)
    )
    network.load_state_dict(tensors)
    network.save_pretrained(folder)
    with jax.set_mesh(mesh_of("one device")):
        report = verify(folder, str(tmp_path / "checkpoint"), mesh_of("one device"))
    assert float(report.split("differ by at most ")[1].split()[0]) > 1e-2
    assert float(report.split("KL ")[1].split()[0]) > 1e-4


GPT2 = {"model_type": "gpt2", "rope_parameters": None}
UNSUPPORTED = {
    "unknown": ({"model_type": "bloom"}, "model_type is 'bloom'"),
    "no sizes": ({"hidden_size": None}, "hidden_size is None"),
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu', which stackjax cannot"),
    "biases": ({"attention_bias": True}, "no tensor model.layers.0.self_attn.q_proj.bias"),
    "mlp biases": ({"mlp_bias": True}, "no tensor model.layers.0.mlp.gate_proj.bias"),
    "longrope of phi3": (
        {"model_type": "phi3", "rope_scaling": {"type": "su", "factor": 4.0}},
        "rope_type 'su'",
    ),
    "scaled scores of gpt2": (
        GPT2 | {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx True",
    ),
    "cross attention of gpt2": (
        GPT2 | {"add_cross_attention": True},
        "add_cross_attention True",
    ),
    "both names of gpt2": ({"model_type": "gpt2", "n_embd": 16}, "both n_embd and hidden_size"),
    "head_dim of gpt_neox": ({"model_type": "gpt_neox", "head_dim": 8}, "head_dim 8"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
        "rope_type 'dynamic'",
    ),
    "longrope in rope_scaling": (
        {"rope_parameters": None, "rope_scaling": {"type": "longrope", "factor": 4.0}},
        "rope_type 'longrope'",
    ),
    "yarn without factor": ({"rope_parameters": {"rope_type": "yarn"}}, "lacks factor"),
    "partial rotation": (
        {"rope_parameters": folders.LLAMA3 | {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    "incomplete rope": ({"rope_parameters": {"rope_type": "llama3"}}, "lacks factor, low_freq"),
    "odd heads": ({"num_key_value_heads": 3}, "does not divide"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with three weight files."""
    return folders.write(tmp_path_factory.mktemp("whole"), "llama", num_shards=3)


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def change_config(path, changes):
    fields = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_model_is_refused_by_field(changes, message, copy):
    change_config(copy, changes)
    with pytest.raises(ValueError) as error:
        read_folder(copy)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
            "sliding_window of 8",
        ),
        ("mistral, wide heads", {"sliding_window": 0}, "sliding_window is 0"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            "layer_types has 'sliding_attention'",
        ),
    ],
)
def test_sliding_window_is_refused(name, changes, message, tmp_path):
    path = folders.write(tmp_path / "folder", name)
    change_config(path, changes)
    with pytest.raises(ValueError, match=message):
        read_folder(path)


def old_gpt2(name):
    """Returns the name of a tensor in the folders of GPT-2 on the Hub."""
    return name.removeprefix("transformer.")


def old_gpt_neox(name):
    """Returns the name of a tensor in transformers' network."""
    return name.replace("embed_out", "lm_head")


@pytest.mark.parametrize(
    ("name", "old", "mask"),
    [("gpt2", old_gpt2, "h.0.attn"), ("gpt_neox", old_gpt_neox, "gpt_neox.layers.0.attention")],
)
def test_older_names_and_stored_masks_are_read(name, old, mask, tmp_path):
    folder = folders.write(tmp_path / "folder", name)
    expected = load_arrays(read_folder(folder))
    masks = {
        f"{mask}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{mask}.masked_bias": torch.tensor(-1e9),
    }
    change_tensors(
        folder, lambda tensors: {old(key): value for key, value in tensors.items()} | masks
    )
    found = read_folder(folder)
    jax.tree.map(np.testing.assert_array_equal, load_arrays(found), expected)
    convert_model(folder, tmp_path / "checkpoint", verify=True)
    convert_model(tmp_path / "checkpoint", tmp_path / "back")
    folders.assert_same_weights(tmp_path / "back", folders.write(tmp_path / "new names", name))


def test_mistral_without_window_field_has_the_default_window():
    fields = {"model_type": "mistral", "max_position_embeddings": 32768} | folders.SIZES
    (kind,) = config_json.model_config(fields).pattern
    assert kind.window == 4096


NEW_FAMILIES = {
    "mistral": dataclasses.replace(KINDS["windows"], qkv_bias=False),
    "qwen2": dataclasses.replace(KINDS["one period"], qkv_bias=True),
    "olmo2": KINDS["like olmo"],
    "phi3": dataclasses.replace(KINDS["partly rotary"], head_dim=4, unit_offset=False),
    "smollm3": dataclasses.replace(
        KINDS["cut period, not rotary"],
        pattern=(LayerKind(), LayerKind(window=3, rotary=False)),
    ),
    "gpt_neox": dataclasses.replace(KINDS["like gpt-neox"], head_dim=4),
    "gpt2": dataclasses.replace(KINDS["like gpt-2"], head_dim=4, max_seq_len=70),
    "gemma2": dataclasses.replace(
        KINDS["like gemma"], pattern=(LayerKind(window=3), LayerKind())
    ),
    "gemma3_text": dataclasses.replace(
        KINDS["like gemma"],
        attention_cap=None,
        qk_norm=True,
        num_layers=5,
        pattern=(LayerKind(window=3, rope_theta=50.0), LayerKind()),
    ),
}


# Equal to what the folder says: a query scale of `head_dim`, the model's rotation in all
# layers, and a window of the whole context.
IMPLIED = {
    "mistral": {"pattern": (LayerKind(window=40),)},
    "gemma2": {"query_scale": None},
    "gemma3_text": {"pattern": (LayerKind(window=3), LayerKind())},
}


@pytest.mark.parametrize(
    ("kind", "changes"), [*((kind, {}) for kind in NEW_FAMILIES), *IMPLIED.items()]
)
def test_model_from_scratch_is_exported_in_its_family(
    kind, changes, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(NEW_FAMILIES[kind], **changes)
    monkeypatch.setattr(SavedCheckpoint, "seq_len", 40)
    with jax.set_mesh(mesh_of("one device")):
        checkpoint = write_checkpoint(tmp_path / "run", config, random_params(config))
    convert_model(checkpoint, tmp_path / "folder", tokenizer="bytes", verify=True)
    report = capsys.readouterr().out
    # Float32 rounding, relative to the size of the logits, with embeddings four times as large.
    difference, deviation = re.search(r"at most (\S+) .* is (\S+)\)", report).groups()
    assert float(difference) < 2e-5 * max(1, 4 * float(deviation))
    found = read_folder(tmp_path / "folder")
    assert found.fields["model_type"] == kind
    assert changes or found.model.kinds == config.kinds


def missing_shard(path):
    next(iter(sorted(path.glob("model-*")))).unlink()


def truncated_shard(path):
    file = next(iter(sorted(path.glob("model-*"))))
    file.write_bytes(file.read_bytes()[:-5])


def truncated_header(path):
    file = next(iter(sorted(path.glob("model-*"))))
    file.write_bytes(file.read_bytes()[:11])


def wrong_index(path):
    index = json.loads((path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = files[0]
    (path / INDEX).write_text(json.dumps(index))


def broken_index(path):
    (path / INDEX).write_text("{}")


def only_pickles(path):
    for file in [*path.glob("model-*"), path / INDEX]:
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"")


def no_weights(path):
    for file in [*path.glob("model-*"), path / INDEX]:
        file.unlink()


def more_layers(path):
    change_config(path, {"num_hidden_layers": 4})


def fewer_layers(path):
    change_config(path, {"num_hidden_layers": 2})


def wider_mlp(path):
    change_config(path, {"intermediate_size": 24})


def no_config(path):
    (path / "config.json").unlink()


def broken_config(path):
    (path / "config.json").write_text("{")


DAMAGES = {
    missing_shard: r"lacks model-00001-of-0000\d.safetensors.*index.json",
    truncated_shard: r"model-00001-of-0000\d.safetensors is damaged",
    truncated_header: r"model-00001-of-0000\d.safetensors is damaged",
    wrong_index: r"has no tensor lm_head.weight.*model.safetensors.index.json",
    broken_index: r"weight_map is None",
    only_pickles: r"pytorch_model.bin, a pickle",
    no_weights: r"has no weights",
    more_layers: r"has no tensor model.layers.3.input_layernorm.weight",
    fewer_layers: r"holds model.layers.2.* \(9 such tensors\)",
    wider_mlp: r"gate_proj.weight in .* has shape \[20, 16\].* \[24, 16\]",
    no_config: r"has no config.json",
    broken_config: r"config.json is not JSON",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_folder_is_one_line(damage, copy, tmp_path, run_main):
    damage(copy)
    code, _, error = run_main(main, copy, tmp_path / "target")
    assert (code, error.count("\n")) == (2, 1)
    assert re.search(DAMAGES[damage], error), error
    assert not (tmp_path / "target").exists()


def test_export_of_unsupported_architectures_is_refused():
    biased = dataclasses.replace(MODELS["gqa"], qkv_bias=True, qk_norm=True)
    with pytest.raises(ValueError, match="no model_type has the architecture"):
        config_json.config_fields(biased, "float32", None, 8)
    empty = dataclasses.replace(MODELS["gqa"], num_layers=0)
    with pytest.raises(ValueError, match=r"model\.num_layers is 0, and a folder"):
        config_json.config_fields(empty, "float32", None, 8)
    odd = dataclasses.replace(MODELS["gqa"], embed_dim=18)
    with pytest.raises(ValueError, match=r"model\.num_heads 4 does not divide"):
        config_json.config_fields(odd, "float32", None, 8)
