"""Comparison of logits from transformers and stackjax on the same tokens.

Shapes: B batch, T time, V vocabulary.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stackjax import model
from stackjax.inference.saved_model import open_model
from stackjax.model import ModelConfig

_ROWS, _TOKENS = 4, 64


def verify(folder: Path, checkpoint: str, mesh: Mesh) -> str:
    """Returns a one-line comparison of float32 logits on random tokens."""
    saved = open_model(checkpoint)
    vocab_size = saved.model.vocab_size
    shape = _ROWS, min(_TOKENS, saved.model.max_seq_len or _TOKENS)
    tokens_BT = np.random.default_rng(0).integers(0, vocab_size, shape)
    theirs_BTV = _transformers_logits(folder, tokens_BT)
    params = saved.load_params(saved.model, mesh)
    ours_BTV = _own_logits(saved.model, params, tokens_BT)
    return describe(theirs_BTV, ours_BTV)


def describe(theirs_BTV: np.ndarray, ours_BTV: np.ndarray) -> str:
    """Returns a line with maximum difference, argmax agreement and KL divergence."""
    difference = np.abs(theirs_BTV - ours_BTV).max()
    agreement = np.mean(theirs_BTV.argmax(-1) == ours_BTV.argmax(-1))
    logs, others = _log_softmax(theirs_BTV), _log_softmax(ours_BTV)
    divergence = np.mean(np.sum(np.exp(logs) * (logs - others), axis=-1))
    return (
        f"verify  logits of transformers and stackjax differ by at most {difference:.2e} "
        f"(their standard deviation is {theirs_BTV.std():.3g}); the likeliest token agrees at "
        f"{agreement:.2%} of {logs[..., 0].size} positions; "
        f"KL {divergence:.2e} nats"
    )


def _own_logits(config: ModelConfig, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
    run, shape = jax.jit(model.apply, static_argnums=0), tokens_BT.shape
    config = dataclasses.replace(config, compute_dtype="float32")
    positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    with jax.default_matmul_precision("highest"):
        logits_BTV = run(config, params, tokens_BT.astype(np.int32), positions_BT, None)
    return np.asarray(logits_BTV[..., : config.vocab_size], np.float64)


def _transformers_logits(folder: Path, tokens_BT: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    network: Any = load(folder, dtype=torch.float32, trust_remote_code=False)
    with torch.inference_mode():
        return network(torch.tensor(tokens_BT)).logits.double().numpy()


def _log_softmax(logits_BTV: np.ndarray) -> np.ndarray:
    shifted = logits_BTV - logits_BTV.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
