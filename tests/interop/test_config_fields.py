"""Every config.json field is read as in transformers, or refused."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import folders
import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import mesh_of
from decoder import logits_of_documents

from stackjax.interop.huggingface import load_params, read_folder
from stackjax.runtime.errors import UserError

KINDS = {
    "llama": "llama",
    "mistral": "mistral, wide heads",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "olmo2": "olmo2",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3, untied",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "gpt_neox": "gpt_neox",
    "gpt2": "gpt2, untied",
}
CLASSES = {kind: transformers.CONFIG_MAPPING[kind] for kind in KINDS}
OWN_FIELDS = {
    kind: sorted({field.name for field in dataclasses.fields(config)} | {"model_type"})
    for kind, config in CLASSES.items()
}
LENGTH = 12
TOKENS = torch.tensor(folders.tokens(rows=1, length=LENGTH))
PREFIX = LENGTH - 1
"""Prefill length in the reference model; the last token uses the KV cache."""

ANYTHING = (None, True, False, 0, 2, -3, 0.5, math.nan, math.inf, "x", [1], {"a": 1})
"""Values of many types; every field is tried with each."""
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = folders.LLAMA3
YARN = folders.YARN
LLAMA3_OPEN = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
SLIDES = ["sliding_attention"] * 3
FULL = ["full_attention"] * 3

ABSENT = object()
CHANGES = {
    "hidden_act": ["swish", "gelu", "SiLU", "linear"],
    "rms_norm_eps": [1e-2, 1, 0.0, -1.0, "1e-6", ABSENT],
    "num_key_value_heads": [1, 2, 3, 4, ABSENT],
    "num_attention_heads": [2, 3, 5, 8],
    "head_dim": [4, 6, 7, 128, ABSENT],
    "hidden_size": [8, 18],
    "max_position_embeddings": [LENGTH - 4, 10**6],
    "tie_word_embeddings": ["no", 0, ABSENT],
    "attention_bias": [True, "yes"],
    "mlp_bias": [True, "yes"],
    "attention_dropout": [0.5],
    "layer_types": [FULL, SLIDES, FULL[1:], ["attention"] * 3, [*FULL[1:], "linear_attention"]],
    "rope_theta": [1e6, 10000, 0, -1.0, "1e4", ABSENT],
    "rope_parameters": [
        {},
        {"rope_theta": 1e6},
        {"rope_theta": 10000},
        {"type": "default"},
        {"rope_type": None},
        {"rope_type": ["default"]},
        {"type": "linear", "rope_type": "default"},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "axial"},
        {"rope_type": "proportional"},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        YARN,
        YARN | {"truncate": False},
        YARN | {"truncate": None},
        YARN | {"factor": None},
        YARN | {"factor": None, "original_max_position_embeddings": 6},
        YARN | {"attention_factor": 0.7},
        YARN | {"attention_factor": -1.0},
        YARN | {"mscale": 0.7, "mscale_all_dim": 2},
        YARN | {"mscale": 0.7},
        YARN | {"beta_fast": None, "beta_slow": 0},
        YARN | {"beta_fast": 0.1},
        YARN | {"partial_rotary_factor": 0.5},
        {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"},
        {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]},
        {"type": "su", "factor": 2.0},
        DEFAULT | {"partial_rotary_factor": 0.5},
        DEFAULT | {"factor": 8.0},
        DEFAULT | {"rope_theta": None},
        DEFAULT | {"rope_theta": "1e4"},
        {"full_attention": DEFAULT},
        LLAMA3,
        LLAMA3_OPEN,
        LLAMA3 | {"partial_rotary_factor": 0.5},
        LLAMA3 | {"partial_rotary_factor": 1.0},
        LLAMA3 | {"factor": "8"},
        LLAMA3 | {"factor": 1},
        LLAMA3 | {"original_max_position_embeddings": 20.0},
        LLAMA3 | {"high_freq_factor": 0.1},
        {k: v for k, v in LLAMA3.items() if k != "factor"},
    ],
    "partial_rotary_factor": [0.5, 1.0],
    "rotary_pct": [0.5, 1.0, 2],
    "rotary_emb_base": [50.0, "x"],
    "layer_norm_eps": [1e-2, 0.0, "x"],
    "use_parallel_residual": [False, None],
    "n_embd": [16, 32],
    "n_head": [2, 3],
    "n_layer": [2],
    "n_positions": [LENGTH - 4, 30],
    "n_inner": [None, 64, 8],
    "layer_norm_epsilon": [1e-2, ABSENT],
    "activation_function": ["gelu_fast", "relu", ABSENT],
    "scale_attn_weights": [False],
    "scale_attn_by_inverse_layer_idx": [True],
    "reorder_and_upcast_attn": [True],
    "add_cross_attention": [True],
    "sliding_window": [4, LENGTH, 10**7, "4", ABSENT],
    "is_causal": [False, True, None, 0],
    "pad_token_id": [5, -1, 300],
    "model_type": ["llama", "qwen2", "gpt2", "Llama", ["llama"]],
    "original_max_position_embeddings": [16],
    "per_layer_config": [{}, {"0": {"rms_norm_eps": 1.0}}],
    "attribute_map": [{}, {"rms_norm_eps": "initializer_range"}],
    "dtype": ["float16", "int8", "x"],
    "num_labels": [3],
    "pretraining_tp": [2],
    "logits_scaling": [2.0],
    "attention_multiplier": [0.5],
    "final_logit_softcapping": [1.0],
    "attn_logit_softcapping": [1.0],
    "residual_multiplier": [0.5],
    "embedding_multiplier": [2.0],
    "query_pre_attn_scalar": [3.0],
    "rope_interleaved": [True],
    "use_qk_norm": [True],
    "no_rope_layers": [
        [0, 0, 0],
        [1, 0, 1],
        [True, False, True],
        [1, 1],
        [1, 1, 0, 0],
        [1, 2, 0],
    ],
    "no_rope_layer_interval": [1, 2, 3],
    "use_sliding_window": [True],
    "use_bidirectional_attention": [True],
    "text_config": [None, {}, {"hidden_size": 8}, 2],
    "decoder": [None, {}, 2],
    "scale_embedding": [True],
    "hidden_activation": ["silu", "gelu", "gelu_pytorch_tanh", "GELU"],
    "rope_local_base_freq": [1e3, 0, "x"],
}
"""Additional values per field; every field is also tried with `ANYTHING`."""
COMBINATIONS = [
    {"rope_scaling": scaling} | others
    for scaling, others in itertools.product(
        [{}, {"factor": 4.0}, {"rope_theta": 1e6}, LLAMA3, LLAMA3_OPEN, {"type": "yarn"}, "x"],
        [{}, {"rope_parameters": LLAMA3 | {"factor": 2.0}}, {"rope_theta": 1e6}],
    )
]
COMBINATIONS += [
    {"rope_parameters": rope, "rope_theta": theta}
    for rope in (None, {}, {"rope_type": "default"}, LLAMA3)
    for theta in (1e6, None, ABSENT)
]
COMBINATIONS += [
    {"rope_parameters": rope, "original_max_position_embeddings": original}
    for rope in (LLAMA3, LLAMA3_OPEN)
    for original in (16, None, "16")
]
COMBINATIONS += [
    {"rope_parameters": LLAMA3_OPEN, "max_position_embeddings": 20},
    {"rope_parameters": LLAMA3_OPEN, "max_position_embeddings": ABSENT},
    {"rope_parameters": LLAMA3, "partial_rotary_factor": 0.5},
    {"head_dim": ABSENT, "hidden_size": 18, "num_attention_heads": 4},
]
COMBINATIONS += [
    {"use_sliding_window": on, "sliding_window": window, "max_window_layers": first}
    | {"layer_types": kinds}
    for on, window, first, kinds in itertools.product(
        (True, ABSENT), (4, None, ABSENT), (0, 2, 3, ABSENT), (FULL, SLIDES, None)
    )
]
COMBINATIONS += [
    {"layer_types": kinds, "sliding_window": 4, name: period}
    for kinds in (None, ABSENT, FULL)
    for name in ("sliding_window_pattern", "_sliding_window_pattern")
    for period in (1, 2, 3, 0, "x")
]
STRICTER = {
    "attention_bias": "biases without a tensor are zero",
    "mlp_bias": "biases without a tensor are zero",
    "use_bidirectional_attention": "tokens of a longer text would see later ones",
    "is_causal": "null masks no future token in a padded batch",
    "per_layer_config": "another model may read it",
    "attribute_map": "it renames fields",
    "dtype": "an unknown type, replaced by transformers",
    "rope_parameters": "a rotation for later positions or some layers only",
    "rope_scaling": "a rotation for later positions or some layers only",
    "max_position_embeddings": "shorter than every text",
    "quantization_config": "weights may be of another type",
    "transformers_weights": "it names another weight file",
    "model_type": "the tensors of another family",
    "attention_chunk_size": "it cuts the cache of longer texts",
    "rms_norm_eps": "0 divides by zero where a position is zero",
    "kv_sharing_modes": "it shares the cache of some layers",
    "attention_dropout": "NaN and infinity are not rates",
    **dict.fromkeys(
        ("embd_pdrop", "resid_pdrop", "attn_pdrop", "summary_first_dropout"),
        "NaN and infinity are not rates",
    ),
    **dict.fromkeys(("hidden_dropout", "classifier_dropout"), "NaN is no rate"),
    "add_cross_attention": "layers without an input",
    "pad_token_id": "no token of the vocabulary",
    "initializer_range": "NaN and infinity are not ranges",
}
"""Fields with values refused only by stackjax although the logits stay equal, with reasons."""
MORE_LENIENT = {
    **dict.fromkeys(("output_hidden_states", "return_dict"), "a choice of outputs"),
    "id2label": "class names; a language model has no classes",
    "auto_map": "code that is not run",
    **dict.fromkeys(("mlp_layer_types", "mtp_layer_types"), "layers of other families"),
    **dict.fromkeys(
        ("_attn_implementation", "_experts_implementation", "compile_config"),
        "how transformers runs the model",
    ),
}
"""Fields with values refused only by transformers, with reasons."""


def names_read_by_transformers() -> set[str]:
    """Returns config attributes that shared code in transformers reads by name."""
    root = Path(transformers.__file__).parent
    files = ("cache_utils", "configuration_utils", "masking_utils", "modeling_rope_utils")
    files += ("modeling_utils", "integrations/sdpa_attention", "models/auto/auto_factory")
    text = "".join((root / f"{name}.py").read_text() for name in files)
    return set(re.findall(r'attr\(\w*\.?\w*config\w*, "(\w+)"', text))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """A model family."""
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    """A valid folder of the model family."""
    # Learned positions are a tensor; other folders get the length below.
    changes = {"n_positions": LENGTH} if kind == "gpt2" else {}
    return ValidFolder(folders.write(tmp_path_factory.mktemp(kind), KINDS[kind], **changes))


class ValidFolder:
    """A valid folder, with config fields, weights, model and logits."""

    def __init__(self, path):
        self.path = path
        fields = json.loads((path / "config.json").read_text())
        # The context is as long as the tested text.
        length = "n_positions" if "n_positions" in fields else "max_position_embeddings"
        self.fields = fields | {length: LENGTH}
        (path / "config.json").write_text(json.dumps(self.fields))
        self.weights = {
            # The name in the network of GPT-NeoX.
            name.replace("embed_out", "lm_head"): tensor.double()
            for name, tensor in folders.weights(path).items()
        }
        self.model = read_folder(path).model
        logits = transformers_logits(self.fields, self.weights)
        assert logits is not None
        self.logits = logits


@torch.inference_mode()
def transformers_logits(fields, weights):
    """Returns logits from transformers, the last with a KV cache; None if refused."""
    try:
        fields = json.loads(json.dumps(fields))
        default = CLASSES[fields["model_type"]]().tie_word_embeddings
        if fields.get("tie_word_embeddings", default) is True:
            # A stored head with other values is not tied, as in `from_pretrained`.
            fields["tie_word_embeddings"] = False
        config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        network.load_state_dict(weights, strict=False)
        network.eval()
        first = network(TOKENS[:, :PREFIX], use_cache=True, return_dict=True)
        last = network(
            TOKENS[:, PREFIX:],
            past_key_values=first.past_key_values,
            use_cache=True,
            return_dict=True,
        )
    except Exception:  # transformers raises many types
        return None
    return torch.cat([first.logits, last.logits], 1).numpy()


def with_changes(fields, changes):
    kept = {name: value for name, value in fields.items() if name not in changes}
    return kept | {name: value for name, value in changes.items() if value is not ABSENT}


def stackjax_logits(path):
    found = read_folder(path)
    mesh = mesh_of("one device")
    with jax.set_mesh(mesh):
        params = jax.tree.map(np.asarray, load_params(found, found.model, mesh))
    return logits_of_documents(found.model, params, TOKENS.numpy())[..., : folders.VOCAB]


def mismatch(original, changes):
    """Returns a difference between stackjax and transformers after a change, or None."""
    fields = with_changes(original.fields, changes)
    (original.path / "config.json").write_text(json.dumps(fields))
    theirs = transformers_logits(fields, original.weights)
    moved = theirs is not None and not np.abs(theirs - original.logits).max() < 1e-4
    try:
        model = read_folder(original.path).model
    except UserError as error:
        if theirs is None or moved or any(name in STRICTER for name in changes):
            return None
        return f"is refused, but does not change the logits: {error}"
    if theirs is None:
        lenient = {*MORE_LENIENT}
        if model.positions == "learned":
            lenient.add("rope_scaling")  # transformers checks a field without effect
        return None if lenient & changes.keys() else "transformers refuses"
    if model == original.model:
        return "is ignored, but changes the logits" if moved else None
    difference = np.abs(theirs - stackjax_logits(original.path)).max()
    return None if difference < 1e-4 else f"differs from transformers by {difference}"


def mismatches(original, cases):
    found = ((changes, mismatch(original, changes)) for changes in cases)
    return [f"{changes} {text}" for changes, text in found if text is not None]


def values_for(kind, values):
    """Returns the values for a family; each value belongs to a single family."""
    return values[list(KINDS).index(kind) :: len(KINDS)]


@pytest.mark.sample(3)
def test_class_fields_are_read_as_in_transformers(kind, folder):
    cases = [{name: value} for name in OWN_FIELDS[kind] for value in values_for(kind, ANYTHING)]
    assert mismatches(folder, cases) == []


@pytest.mark.sample(4)
def test_special_values_are_read_as_in_transformers(folder):
    cases = [{name: value} for name, values in CHANGES.items() for value in values]
    assert mismatches(folder, cases) == []


@pytest.mark.sample(4)
def test_field_combinations_are_read_as_in_transformers(folder):
    assert mismatches(folder, COMBINATIONS) == []


def test_fields_of_every_config_class_are_read_as_in_transformers(kind, folder):
    names = names_read_by_transformers()
    assert {"is_causal", "layer_types", "sliding_window", "kv_sharing_modes"} <= names
    values = values_for(kind, (False, 4, "x", [1], {"a": 1}, True, 0.5, []))
    cases = [{name: value} for name in sorted(names) for value in values]
    assert mismatches(folder, cases) == []
