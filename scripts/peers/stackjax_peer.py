"""The compiled step of `python -m stackjax.train`, unrolled like configs/tiny.py."""

from typing import Any

import jax
import numpy as np

from scripts.peers.peer import LEARNING_RATE, Peer, Shape
from stackjax.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    Schedule,
    Stage,
)
from stackjax.data.batch import Batch
from stackjax.data.config import DataConfig
from stackjax.data.device import put
from stackjax.model import ModelConfig
from stackjax.optimizers import AdamW
from stackjax.runtime.cpu_memory import keep_memory
from stackjax.sharding.mesh import build_mesh
from stackjax.training.compile import compile_step, new_state, step_inputs
from stackjax.training.expand import expand


def build(shape: Shape) -> Peer:
    """Returns the step, compiled."""
    keep_memory()
    config = get_config(shape)
    [phase] = expand(config)
    mesh = build_mesh(phase.mesh)
    jax.set_mesh(mesh)
    state = new_state(config, phase)
    compiled, inputs = compile_step(config, phase), step_inputs(phase)
    [batch] = put([get_batch(shape)], mesh, shape.batch_size)

    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        state, metrics = compiled(inputs, state, batch)
        return state, metrics["loss"]

    return Peer(
        step=step,
        state=state,
        batch=batch,
        wait=jax.block_until_ready,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    )


def get_config(shape: Shape) -> Config:
    """Returns a run with the shape's sizes; file paths are unused."""
    every = 10**9
    return Config(
        model=ModelConfig(
            vocab_size=shape.vocab_size,
            num_layers=shape.num_layers,
            embed_dim=shape.embed_dim,
            mlp_dim=shape.mlp_dim,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_heads,
            head_dim=shape.head_dim,
        ),
        data=DataConfig(path="nowhere", seq_len=shape.seq_len),
        optimizer=AdamW(peak_learning_rate=LEARNING_RATE, schedule=Schedule(shape="constant")),
        stages=(Stage(tokens=every, batch_size=shape.batch_size),),
        evaluation=EvaluationConfig(every_tokens=every, num_sequences=1, batch_size=1),
        checkpoints=CheckpointConfig(every_tokens=every),
        logging=LoggingConfig(every_tokens=every),
        workdir="nowhere",
    )


def get_batch(shape: Shape) -> Batch:
    """Returns a microbatch in the loader's format; each row is a document."""
    tokens = shape.tokens()[None, :, :-1]
    weights = np.ones(tokens.shape, np.float32)
    weights[..., -1] = 0
    positions = np.broadcast_to(np.arange(shape.seq_len, dtype=np.int32), tokens.shape)
    return Batch(tokens, positions, None, weights)
