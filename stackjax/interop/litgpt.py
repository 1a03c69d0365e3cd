"""Import of lit-gpt state dicts (`.pth` files), the checkpoint format in arXiv:2405.15319.

Query, key and value projections are fused into a single matrix. Rows are grouped by key head:
query heads, then key, then value. RoPE is the same as in stackjax.
"""

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from stackjax.interop import check_installed
from stackjax.interop.config_json import model_config
from stackjax.interop.huggingface import Folder, check_tensors
from stackjax.interop.rule import shown
from stackjax.interop.tensors import DTYPES, TensorInfo, widest
from stackjax.runtime.errors import UserError

_HEAD_DIMS = {1024: 64, 2048: 64, 2560: 128, 4096: 128}
"""Maps the paper models' channels to head size, which no tensor shape determines."""
_SEQ_LEN = 2048

_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "norm_1.weight": "input_layernorm.weight",
    "attn.proj.weight": "self_attn.o_proj.weight",
    "norm_2.weight": "post_attention_layernorm.weight",
    "mlp.swiglu.w1.weight": "mlp.gate_proj.weight",
    "mlp.swiglu.w2.weight": "mlp.up_proj.weight",
    "mlp.swiglu.w3.weight": "mlp.down_proj.weight",
}
"""Maps lit-gpt tensor names to transformers, without layer numbers or the fused tensor."""
_FIRST = "transformer.h.0."
_FUSED = "attn.attn.weight"
_PROJECTIONS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
)
"""Exceptions raised by torch.load for damaged or malicious files."""


class _Tensors(Mapping[str, TensorInfo]):
    """A lit-gpt state dict under the tensor names used by transformers."""

    def __init__(self, state: Mapping[str, Any], num_kv_heads: int, head_dim: int):
        self._head_dim = head_dim
        self._num_kv_heads = num_kv_heads
        self._found: dict[str, tuple[Any, int | None]] = {}
        for name, tensor in state.items():
            layer, kind = _split(name)
            prefix = "" if layer is None else f"model.layers.{layer}."
            if kind == _FUSED:
                for i, projection in enumerate(_PROJECTIONS):
                    self._found[prefix + projection] = tensor, i
            else:
                self._found[prefix + _NAMES.get(kind, kind)] = tensor, None

    def __getitem__(self, name: str) -> TensorInfo:
        tensor, part = self._found[name]
        shape = tuple(tensor.shape)
        if part is not None:
            groups = len(tensor) // (self._num_kv_heads * self._head_dim)
            heads = self._num_kv_heads * ((groups - 2) if part == 0 else 1)
            shape = (heads * self._head_dim, *shape[1:])
        return TensorInfo(shape, _dtype(tensor))

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def read(self, name: str) -> np.ndarray:
        """Returns a memory-mapped tensor, or a copy for parts of a fused tensor."""
        tensor, part = self._found[name]
        value = _as_numpy(tensor)
        if part is None:
            return value
        rows = value.reshape(self._num_kv_heads, -1, self._head_dim, value.shape[-1])
        queries = rows.shape[1] - 2
        parts = (slice(0, queries), slice(queries, queries + 1), slice(queries + 1, None))
        return rows[:, parts[part]].reshape(-1, value.shape[-1])


def is_litgpt(path: str) -> bool:
    """Returns whether a path is a lit-gpt file."""
    return path.endswith(".pth")


def read_litgpt(path: Path, head_dim: int | None = None) -> Folder:
    """Returns a `.pth` checkpoint as a Hugging Face folder.

    Args:
      head_dim: Channels per head; by default as in the paper's model with the same width.

    Raises:
      UserError: torch is not installed, or the file is not a lit-gpt LLaMA.
    """
    state = _load(path)
    table = _matrix(state, "transformer.wte.weight", path)
    fused = _matrix(state, _FIRST + _FUSED, path)
    gate = _matrix(state, _FIRST + "mlp.swiglu.w1.weight", path)
    vocab_size, embed_dim = table.shape
    head_dim = head_dim or _HEAD_DIMS.get(embed_dim)
    if head_dim is None:
        raise UserError(
            f"{path} has {embed_dim} channels, unlike any model in arXiv:2405.15319; give the "
            f"channels per head with --head-dim."
        )
    num_heads, num_kv_heads = embed_dim // head_dim, (len(fused) - embed_dim) // (2 * head_dim)
    rows = (num_heads * head_dim, num_kv_heads * 2 * head_dim)
    if rows != (embed_dim, len(fused) - embed_dim) or num_kv_heads < 1:
        raise UserError(
            f"{path}: heads of {head_dim} channels do not fit {embed_dim} channels and a fused "
            f"matrix of {len(fused)} rows; choose another --head-dim."
        )
    layers = [layer for layer, _ in map(_split, state) if layer is not None]
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": _SEQ_LEN,
        "vocab_size": vocab_size,
        "hidden_size": embed_dim,
        "intermediate_size": len(gate),
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES[widest(map(_dtype, state.values()))].name,
    }
    tensors: Any = _Tensors(state, num_kv_heads, head_dim)
    config = model_config(fields, str(path))
    check_tensors(tensors, config, fields["model_type"], str(path))
    return Folder(path.parent, path.name, fields, config, tensors)


def _matrix(state: Mapping[str, Any], name: str, path: Path) -> Any:
    """Returns a matrix from a state dict.

    Raises:
      UserError: The matrix is missing.
    """
    found = state.get(name)
    if found is None or found.dim() != 2:
        raise UserError(f"{path} is not a lit-gpt LLaMA checkpoint: it has no matrix {name}.")
    return found


def _load(path: Path) -> Mapping[str, Any]:
    check_installed("torch")
    import torch

    try:
        # weights_only: loads tensors and containers, never code.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except _LOAD_ERRORS as error:
        raise UserError(
            f"{path} is damaged, or holds more than tensors; no code was run: "
            f"{shown(str(error).partition(chr(10))[0])}"
        ) from error
    state = found.get("model", found) if isinstance(found, dict) else {}
    tensors = state.items() if isinstance(state, dict) else ()
    tensors = {name: each for name, each in tensors if isinstance(each, torch.Tensor)}
    for name, tensor in tensors.items():
        _check(name, tensor, path)
    return tensors


def _check(name: Any, tensor: Any, path: Path) -> None:
    """Raises UserError unless a tensor has a name, a supported type and a valid size."""
    if not isinstance(name, str):
        raise UserError(
            f"{path} has a tensor with the name {shown(name)}; it must be a string."
        )
    if str(tensor.layout) != "torch.strided" or str(tensor.device) != "cpu":
        raise UserError(
            f"{name} in {path} is {tensor.layout} on {tensor.device}; it must be a dense "
            f"tensor on the CPU."
        )
    if _torch_dtype(tensor) not in {dtype.name for dtype in DTYPES.values()}:
        raise UserError(
            f"{name} in {path} is of type {_torch_dtype(tensor)}; it must be "
            f"{', '.join(DTYPES)}: quantized weights are not supported."
        )
    if math.prod(tensor.shape) * tensor.element_size() > path.stat().st_size:
        raise UserError(
            f"{name} in {path} has shape {list(tensor.shape)}, larger than the file; "
            f"download it again."
        )


def _split(name: str) -> tuple[int | None, str]:
    """Returns a tensor's layer (None outside the layers) and name without layer."""
    match = re.fullmatch(r"transformer\.h\.(\d{1,9})\.(.*)", name)
    return (None, name) if match is None else (int(match[1]), match[2])


def _torch_dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtype(tensor: Any) -> str:
    """Returns a tensor's safetensors type, such as `BF16`."""
    return next(n for n, dtype in DTYPES.items() if dtype.name == _torch_dtype(tensor))


def _as_numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
