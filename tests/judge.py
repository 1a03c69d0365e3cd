"""Reference computations from transformers, in float64.

Model and masks are independent of stackjax.
"""

from collections.abc import Mapping

import numpy as np
import torch
import transformers

from stackjax.model import ModelConfig

# More threads are slower for models this small.
torch.set_num_threads(1)


@torch.inference_mode()
def logits(
    config: ModelConfig,
    params: dict,
    tokens_BT: np.ndarray,
    masks: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Returns the logits without vocabulary padding, [B, T, V].

    Args:
      masks: Activation masks along "layers", "embed", "mlp" and "heads", as in
        arXiv:2305.02869; all other axes are open. A tied head reads the
        masked embedding.
    """
    network = loaded(config, params)
    if masks is not None:
        _mask(config, network, masks)
    out = network(torch.tensor(tokens_BT, dtype=torch.long), use_cache=False)
    return out.logits[..., : config.vocab_size].numpy()


@torch.inference_mode()
def streams(config: ModelConfig, params: dict, tokens_BT: np.ndarray) -> list[np.ndarray]:
    """Returns the residual streams before the first layer and after every layer, [B, T, D]."""
    network, seen = loaded(config, params), []
    for reader in (*network.model.layers, network.model.norm):
        reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy().copy()))
    network(torch.tensor(tokens_BT, dtype=torch.long), use_cache=False)
    return seen


@torch.inference_mode()
def greedy(
    config: ModelConfig, params: dict, prompt_T: np.ndarray, num_tokens: int
) -> np.ndarray:
    """Returns greedily decoded tokens."""
    network = loaded(config, params)
    # `generate` would otherwise choose padding tokens, and stop at an end token.
    banned = [[token] for token in range(config.vocab_size, config.padded_vocab_size)]
    tokens_1T = torch.tensor(prompt_T, dtype=torch.long)[None]
    out = network.generate(
        tokens_1T,
        # Otherwise `generate` would mask prompt tokens equal to the padding token.
        attention_mask=torch.ones_like(tokens_1T),
        do_sample=False,
        max_new_tokens=num_tokens,
        bad_words_ids=banned,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt_T) :].numpy()


def loaded(config: ModelConfig, params: dict) -> torch.nn.Module:
    """Returns the network with these weights."""
    network = _network(config)
    weights = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in _weights(config, params).items()
    }
    network.load_state_dict(weights)
    return network


class _LlamaConfig(transformers.LlamaConfig):
    """The config class without the check that heads divide the channels."""

    def validate_architecture(self):
        pass


def _network(config: ModelConfig) -> torch.nn.Module:
    """Returns LLaMA, or Qwen 3 for query and key norms and biases."""
    llama = _LlamaConfig, transformers.LlamaForCausalLM
    qwen = transformers.Qwen3Config, transformers.Qwen3ForCausalLM
    make_config, make_network = qwen if config.qk_norm or config.qkv_bias else llama
    network = make_network(
        make_config(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters=_rope(config),
            attention_bias=config.qkv_bias,
            tie_word_embeddings=config.tie_head,
            # The eager attention in transformers has a float32 softmax.
            attn_implementation="sdpa",
        )
    ).double()
    for name, module in list(network.named_modules()):
        if name.endswith("norm"):
            # The norms in transformers compute in float32; PyTorch's norms do not.
            shape = tuple(module.weight.shape)
            norm = torch.nn.RMSNorm(shape, eps=config.norm_epsilon, dtype=torch.float64)
            network.set_submodule(name, norm)
        if name.endswith("_norm") and not config.qk_norm:
            network.set_submodule(name, torch.nn.Identity())
    return network


def _rope(config: ModelConfig) -> dict:
    scaling = config.rope_scaling
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is None:
        return rope
    return rope | {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }


def _weights(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """Returns parameters by transformers names, with matrices as [outputs, inputs]."""
    weights = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"],
        "lm_head.weight": params["embedding"] if config.tie_head else params["head"].T,
    }
    for i in range(config.num_layers):
        layer = {name: leaf[i] for name, leaf in params["layers"].items()}
        matrices = {
            "self_attn.q_proj": layer["query"].reshape(config.embed_dim, -1).T,
            "self_attn.k_proj": layer["key"].reshape(config.embed_dim, -1).T,
            "self_attn.v_proj": layer["value"].reshape(config.embed_dim, -1).T,
            "self_attn.o_proj": layer["out"].reshape(-1, config.embed_dim).T,
            "mlp.gate_proj": layer["gate_up"][:, 0].T,
            "mlp.up_proj": layer["gate_up"][:, 1].T,
            "mlp.down_proj": layer["down"].T,
        }
        norms = {
            "input_layernorm": layer["attention_norm"],
            "post_attention_layernorm": layer["mlp_norm"],
        }
        if config.qk_norm:
            norms["self_attn.q_norm"] = layer["query_norm"]
            norms["self_attn.k_norm"] = layer["key_norm"]
        for name, value in (matrices | norms).items():
            weights[f"model.layers.{i}.{name}.weight"] = value
        if config.qkv_bias:
            for name, kind in {"q": "query", "k": "key", "v": "value"}.items():
                bias = f"model.layers.{i}.self_attn.{name}_proj.bias"
                weights[bias] = layer[f"{kind}_bias"].reshape(-1)
            # Qwen 3 also has a bias in the output projection.
            out_bias = np.zeros(config.embed_dim)
            weights[f"model.layers.{i}.self_attn.o_proj.bias"] = out_bias
    return weights


class _MaskedRMSNorm(torch.nn.Module):
    """RMSNorm over masked channels; the mask weights the mean square."""

    def __init__(self, gain: torch.Tensor, mask: torch.Tensor, epsilon: float):
        super().__init__()
        self.gain, self.mask, self.epsilon = gain, mask, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().sum(-1, keepdim=True) / self.mask.sum()
        return x / torch.sqrt(mean_square + self.epsilon) * self.gain * self.mask


def _mask(
    config: ModelConfig, network: torch.nn.Module, masks: Mapping[str, np.ndarray]
) -> None:
    """Multiplies activations by masks: written channels, MLP units, heads and layers."""
    sizes = {
        "layers": config.num_layers,
        "embed": config.embed_dim,
        "mlp": config.mlp_dim,
        "heads": config.num_heads,
    }
    open_masks = {axis: np.ones(size) for axis, size in sizes.items()}
    mask = {axis: torch.tensor(values) for axis, values in (open_masks | dict(masks)).items()}
    body = network.model

    def norm(gain: torch.Tensor) -> _MaskedRMSNorm:
        return _MaskedRMSNorm(gain, mask["embed"], config.norm_epsilon)

    _scale_output(body.embed_tokens, mask["embed"])
    for layer, is_open in zip(body.layers, mask["layers"], strict=True):
        layer.input_layernorm = norm(layer.input_layernorm.weight)
        _scale_input(layer.self_attn.o_proj, mask["heads"].repeat_interleave(config.head_dim))
        _scale_output(layer.self_attn.o_proj, mask["embed"] * is_open)
        layer.post_attention_layernorm = norm(layer.post_attention_layernorm.weight)
        _scale_input(layer.mlp.down_proj, mask["mlp"])
        _scale_output(layer.mlp.down_proj, mask["embed"] * is_open)
    body.norm = norm(body.norm.weight)
    if config.tie_head:
        _scale_input(network.lm_head, mask["embed"])


def _scale_input(module: torch.nn.Module, factor: torch.Tensor) -> None:
    module.register_forward_pre_hook(lambda _, args: args[0] * factor)


def _scale_output(module: torch.nn.Module, factor: torch.Tensor) -> None:
    module.register_forward_hook(lambda _, args, out: out * factor)
