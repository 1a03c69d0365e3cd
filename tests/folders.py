"""Hugging Face folders with random weights, and reference logits from transformers."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

# More threads are slower for models this small.
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 0.3,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 20,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.3,
    "original_max_position_embeddings": 20,
}
GEMMA = {"head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 10, "pad_token_id": 0}
FOLDERS = {
    "llama": ("Llama", {}, "float32"),
    "llama, all heads, tied, llama 3 rope": (
        "Llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        "float32",
    ),
    "llama, bfloat16": ("Llama", {"rms_norm_eps": 1e-5}, "bfloat16"),
    "llama, yarn": (
        "Llama",
        {"hidden_size": 32, "rope_parameters": YARN | {"attention_factor": 0.8}},
        "float32",
    ),
    "qwen3, yarn": (
        "Qwen3",
        {"head_dim": 10, "rope_parameters": YARN | {"truncate": False}},
        "float32",
    ),
    "qwen2, yarn": (
        "Qwen2",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "factor": 6}},
        "float32",
    ),
    "phi3": ("Phi3", {"pad_token_id": 0, "rms_norm_eps": 1e-4}, "float32"),
    "phi3, partly rotary, window": (
        "Phi3",
        {
            "pad_token_id": 0,
            "hidden_size": 24,
            "hidden_act": "gelu",
            "sliding_window": 5,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.7,
            },
        },
        "bfloat16",
    ),
    "smollm3": (
        "SmolLM3",
        {
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 2,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
        "float32",
    ),
    "smollm3, windows": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 5,
            "rope_parameters": YARN,
            "pad_token_id": 0,
        },
        "bfloat16",
    ),
    "llama, float64": ("Llama", {}, "float64"),
    "mistral, wide heads": ("Mistral", {"head_dim": 6, "sliding_window": None}, "float32"),
    "mistral, float16": ("Mistral", {"sliding_window": 2**20}, "float16"),
    "qwen2": ("Qwen2", {}, "float32"),
    "qwen2, one key, tied": (
        "Qwen2",
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        "bfloat16",
    ),
    "qwen2, window in upper layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "float32",
    ),
    "mistral, window": ("Mistral", {"sliding_window": 5, "hidden_act": "gelu"}, "bfloat16"),
    "olmo2": ("Olmo2", {"rms_norm_eps": 1e-4}, "float32"),
    "olmo2, tied": ("Olmo2", {"tie_word_embeddings": True}, "bfloat16"),
    "gemma2": (
        "Gemma2",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
        "float32",
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2
            + ["sliding_attention"],
            "hidden_activation": "gelu",
            "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
        "bfloat16",
    ),
    "gemma3, untied": ("Gemma3Text", GEMMA | {"tie_word_embeddings": False}, "float32"),
    "gpt_neox": (
        "GPTNeoX",
        {
            "num_key_value_heads": 4,
            "layer_norm_eps": 1e-3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            },
        },
        "float32",
    ),
    "gpt_neox, in turn, tied, yarn": (
        "GPTNeoX",
        {
            "hidden_size": 32,
            "hidden_act": "gelu_new",
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.75},
        },
        "float16",
    ),
    "gpt2": ("GPT2", {"n_positions": 25, "layer_norm_epsilon": 1e-3, "n_inner": 20}, "float32"),
    "gpt2, untied": (
        "GPT2",
        {
            "n_positions": 30,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "bfloat16",
    ),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, "float32"),
    "qwen3": ("Qwen3", {"head_dim": 6}, "float32"),
    "qwen3, tied, other base": (
        "Qwen3",
        {
            "head_dim": 4,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "bfloat16",
    ),
}
"""Family, differences from `SIZES`, and weight dtype."""


def write(path: Path, name: str, num_shards: int = 1, **changes) -> Path:
    """Writes a folder from `FOLDERS`, with logits near 1."""
    family, fields, dtype = FOLDERS[name]
    values = SIZES | fields | changes
    config = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(0)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    network = getattr(transformers, f"{family.removesuffix('Text')}{head}")(config)
    for kind, weight in network.named_parameters():
        if kind.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
            low = -0.5 if family.startswith("Gemma") else 0.5  # Gemma adds 1
            torch.nn.init.uniform_(weight, low, low + 1)
        else:
            torch.nn.init.normal_(weight, std=0.2)
    network.to(getattr(torch, dtype)).save_pretrained(
        path, max_shard_size=_shard_size(network, dtype, num_shards)
    )
    return path


def _shard_size(network: torch.nn.Module, dtype: str, num_shards: int) -> int:
    size = sum(weight.numel() for weight in network.parameters())
    return -(-size * getattr(torch, dtype).itemsize // num_shards)


@functools.cache
def tokens(rows: int = 2, length: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (rows, length), dtype=np.int32)


@torch.inference_mode()
def logits(path: Path, dtype: str = "float32") -> np.ndarray:
    """Returns logits from transformers for `tokens`, [B, T, V] in float64."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    # Only the eager attention has a cap of the logits.
    kind = "eager" if "softcapping" in (path / "config.json").read_text() else "sdpa"
    network = load(path, dtype=getattr(torch, dtype), attn_implementation=kind)
    if dtype != "float64":
        return network(torch.tensor(tokens())).logits.double().numpy()
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            module.double()  # computes in the type of its input
        elif name.endswith(("norm", "layernorm")):
            # The norms in transformers compute in float32; PyTorch's norms do not.
            shape = tuple(module.weight.shape)
            epsilon = getattr(module, "variance_epsilon", None) or module.eps
            norm = torch.nn.RMSNorm(shape, eps=epsilon, dtype=torch.float64)
            norm.weight.data.copy_(
                module.weight + 1 if "Gemma" in str(module) else module.weight
            )
            network.set_submodule(name, norm)
    softmax = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        # The eager attention has a float32 softmax.
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, **_: softmax(x, dim))
        return network(torch.tensor(tokens())).logits.double().numpy()


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors in a folder, read with safetensors."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_weights(path: Path, expected: Path) -> None:
    """Asserts equal names, dtypes and bits."""
    found, wanted = weights(path), weights(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
