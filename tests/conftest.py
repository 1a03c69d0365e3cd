"""Eight CPU devices, no broadcasting of ranks, and the tables that the laws run over."""

import functools

import jax
import numpy as np
import pytest
from runs import uncut, world  # noqa: F401, session fixtures

from stackjax import model
from stackjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    Stage,
)
from stackjax.data.batch import Batch
from stackjax.growth import Interleave, LayerMap, Stack, chain
from stackjax.model import ModelConfig
from stackjax.sharding import MeshConfig, build_mesh

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of what the tests do; unoptimised it takes a quarter of the time.
jax.config.update("jax_disable_most_optimizations", True)
# Types are not as strict: optax and jax.nn themselves mix them.
jax.config.update("jax_numpy_rank_promotion", "raise")


def tiny_model(**fields) -> ModelConfig:
    """A model whose sizes all differ, and divide over every mesh below."""
    sizes = {
        "vocab_size": 11,
        "vocab_multiple": 24,
        "num_layers": 3,
        "embed_dim": 16,
        "mlp_dim": 20,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
    }
    return ModelConfig(**(sizes | fields))


MODELS = {
    "mha": tiny_model(num_kv_heads=4),
    "gqa": tiny_model(),
    "mqa, tied": tiny_model(num_kv_heads=1, tie_head=True),
    "gqa, tied, qk_norm": tiny_model(tie_head=True, qk_norm=True),
}

# Of three layers these make six: each growth, and the source layer of every target layer.
GROWTHS = {
    "stack": (Stack(factor=2), (0, 1, 2, 0, 1, 2)),
    "interleave": (Interleave(factor=2), (0, 0, 1, 1, 2, 2)),
    "layer map": (LayerMap((0, 1, 1, 2, 1, 2)), (0, 1, 1, 2, 1, 2)),
    "pattern": (LayerMap("12-3*2-23"), (0, 1, 2, 2, 1, 2)),
    "chain": (chain(Stack(factor=3), LayerMap((0, 1, 2, 5, 7, 8))), (0, 1, 2, 2, 1, 2)),
}

MESHES = {
    "one device": (MeshConfig(), 1),
    "fsdp 8": (MeshConfig(fsdp=8), 8),
    "replica 2, fsdp 2, tensor 2": (MeshConfig(replica=2, fsdp=2, tensor=2), 8),
    "fsdp 4, tensor 2": (MeshConfig(fsdp=4, tensor=2), 8),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    """The mesh of that name in `MESHES`."""
    config, num_devices = MESHES[name]
    return build_mesh(config, jax.devices()[:num_devices])


@functools.cache
def random_params(config: ModelConfig):
    """Parameters as numpy arrays, without compiling `init`; gains are about one."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))

    def draw(leaf, axes):
        values = (
            rng.normal(size=leaf.shape) / 4 if axes.reads else rng.uniform(0.5, 1.5, leaf.shape)
        )
        return values.astype(np.float32)

    return jax.tree.map(draw, abstract, model.logical_axes(config))


@pytest.fixture(params=MESHES)
def mesh(request):
    """Every mesh in turn, set."""
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(params=MODELS)
def config(request) -> ModelConfig:
    """Every model in turn."""
    return MODELS[request.param]


def random_batch(seed=0, *, accumulate=1, rows=8, seq_len=8, vocab_size=11) -> Batch:
    """Two documents a row, cut at random; the end of each is not to be learnt past."""
    rng = np.random.default_rng(seed)
    shape = (accumulate, rows, seq_len)
    cut = rng.integers(1, seq_len, (accumulate, rows, 1))
    place = np.arange(seq_len)
    segments = (place >= cut).astype(np.int32)
    weights = np.ones(shape, np.float32)
    weights[..., -1] = 0
    return Batch(
        tokens=rng.integers(0, vocab_size, shape, dtype=np.int32),
        positions=np.where(segments, place - cut, place).astype(np.int32),
        segments=segments,
        loss_weights=np.where(place + 1 == cut, 0, weights).astype(np.float32),
    )


def first_microbatch(batch: Batch) -> Batch:
    """The first microbatch, its fields [B, T]."""
    return Batch(*(field[0] for field in batch))


def tiny_run(workdir="runs/test", **fields) -> Config:
    """A run of two stages, the second twice as deep as the first."""
    values = {
        "model": tiny_model(num_layers=6),
        "data": DataConfig(path="data/test", seq_len=8),
        "optimizer": OptimizerConfig(peak_learning_rate=1e-2),
        "stages": (
            Stage(tokens=640, batch_size=8),
            Stage(tokens=1280, batch_size=16, accumulate=2, growth=Stack(factor=2)),
        ),
        "evaluation": EvaluationConfig(every_tokens=640, num_sequences=8, batch_size=8),
        "checkpoints": CheckpointConfig(every_tokens=128),
        "logging": LoggingConfig(every_tokens=64),
        "workdir": str(workdir),
    }
    return Config(**(values | fields))
