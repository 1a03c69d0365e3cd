"""Eight CPU devices, strict rank promotion, and shared tables of models, meshes and growths."""

import collections
import functools
import gc
import io
import os
from fractions import Fraction

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from runs import FAST_COMPILATION, mixture, uncut, world  # noqa: F401, session fixtures

from stackjax import model
from stackjax.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    Stage,
)
from stackjax.data.batch import Batch
from stackjax.data.config import DataConfig
from stackjax.data.mixture import Mixture
from stackjax.growth import (
    DepthFresh,
    DepthRandom,
    DepthUpscale,
    DepthZero,
    InsertBlock,
    Interleave,
    LayerMap,
    Learn,
    Noise,
    Shrink,
    Stack,
    WidthRandom,
    WidthSplit,
    WidthZero,
    chain,
)
from stackjax.model import ModelConfig
from stackjax.model.config import RopeScaling
from stackjax.model.layer_kind import LayerKind
from stackjax.model.routing_config import Routing
from stackjax.optimizers import AdamW
from stackjax.sharding.config import MeshConfig, mesh_axes
from stackjax.sharding.mesh import build_mesh
from stackjax.training.learning_rate import LearningRate
from stackjax.training.phase import Counts, Phase, Waypoint

jax.config.update("jax_num_cpu_devices", 8)
# Tests mostly compile; unoptimized compilation takes a quarter of the time.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = FAST_COMPILATION
# Nothing that imports make is garbage: the collector need not look at it again and again.
# Traces make millions of small objects, of which few are garbage.
gc.disable()
gc.set_threshold(50_000)
# Dtype promotion is not strict: optax and jax.nn mix dtypes themselves.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run all cases of every test")


def pytest_collection_modifyitems(config, items):
    """Leaves out `slow` tests, and all but every nth case of a test marked `sample(n)`.

    Every law keeps cases. `--all` runs everything; so does the name of a test.
    """
    if config.getoption("all") or any("::" in arg for arg in config.args):
        return
    counts, kept, left_out = collections.Counter(), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        sample = item.get_closest_marker("sample")
        runs = item.get_closest_marker("slow") is None
        if sample is not None:
            runs = counts[test] % sample.args[0] == 0
            counts[test] += 1
        (kept if runs else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    # pytest collects garbage five times as it ends; most objects are cached programs.
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _programs(tmp_path_factory):
    """Caches compiled programs for all tests in a process."""
    directory = str(tmp_path_factory.mktemp("programs"))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def tiny_model(**fields) -> ModelConfig:
    """Returns a model with different sizes, divisible on every mesh below."""
    sizes = {
        "vocab_size": 11,
        "vocab_multiple": 24,
        "num_layers": 3,
        "embed_dim": 16,
        "mlp_dim": 20,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        # A loop over layers compiles faster than unrolled layers.
        "scan_unroll": 1,
    }
    return ModelConfig(**(sizes | fields))


MODELS = {
    "mha, biases": tiny_model(num_kv_heads=4, qkv_bias=True),
    "gqa": tiny_model(),
    "mqa, tied, slowed": tiny_model(
        num_kv_heads=1,
        tie_head=True,
        # The three frequencies are fully scaled, partly scaled, and unscaled.
        rope_theta=100.0,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=0.3, high_freq_factor=2.0, original_seq_len=20
        ),
    ),
    "gqa, tied, qk_norm": tiny_model(tie_head=True, qk_norm=True),
}

LOCAL = LayerKind(window=3, rope_theta=50.0)
SLOWED = RopeScaling(factor=4.0, method="linear")
GLOBAL = LayerKind(rope_theta=200.0, rope_scaling=SLOWED)
# Layers of several kinds, and every switch; in the table above, no model has them.
KINDS = {
    # Whole periods, and one period cut.
    "local and global": tiny_model(num_layers=4, pattern=(LOCAL, GLOBAL)),
    "cut period, not rotary": tiny_model(
        num_layers=5, pattern=(LOCAL, LayerKind(rotary=False)), scan_unroll=2
    ),
    "one period": tiny_model(
        pattern=(LayerKind(), LayerKind(window=2), LayerKind(window=2)), num_kv_heads=1
    ),
    "windows": tiny_model(pattern=(LayerKind(window=4),), qkv_bias=True),
    "looped": tiny_model(num_layers=4, loops=2, pattern=(LOCAL, GLOBAL)),
    "like gemma": tiny_model(
        num_layers=4,
        pattern=(LOCAL, LayerKind()),
        tie_head=True,
        norm_placement="both",
        unit_offset=True,
        activation="gelu_tanh",
        attention_cap=2.0,
        logit_cap=3.0,
        scale_embedding=True,
        query_scale=10.0,
    ),
    "like olmo": tiny_model(qk_norm=True, qk_norm_over="all_heads", norm_placement="after"),
    "yarn": tiny_model(
        head_dim=8,
        rope_theta=100.0,
        rope_scaling=RopeScaling(
            factor=4.0,
            low_freq_factor=0.3,
            high_freq_factor=2.0,
            original_seq_len=20,
            attention_factor=0.8,
            method="yarn",
        ),
    ),
    "like gpt-neox": tiny_model(
        norm="layer",
        num_kv_heads=4,
        parallel_residual=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation="gelu",
        rotary_share=0.7,
    ),
    "like gpt-2": tiny_model(
        norm="layer",
        norm_epsilon=1e-3,
        positions="learned",
        max_seq_len=9,
        num_kv_heads=4,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation="gelu_tanh",
        tie_head=True,
    ),
    "biases and RMSNorm": tiny_model(out_bias=True, mlp_bias=True, parallel_residual=True),
    "LayerNorm after": tiny_model(
        norm="layer", norm_placement="both", out_bias=True, unit_offset=True, gated=False
    ),
    "partly rotary": tiny_model(rotary_share=0.7, activation="gelu", unit_offset=True),
}

DENSE = LayerKind(dense=True)
# Models with experts: every field of the routing, and dense layers among the others.
EXPERTS = {
    "experts": tiny_model(num_experts=4, expert_dim=8, routing=Routing(top_k=2)),
    "not normalized, scaled": tiny_model(
        num_experts=8,
        expert_dim=4,
        routing=Routing(top_k=3, normalize=False, scale=1.5, balance="none", z_loss=0.1),
        qk_norm=True,
    ),
    "like deepseek": tiny_model(
        num_layers=4,
        num_experts=8,
        expert_dim=6,
        num_shared_experts=2,
        routing=Routing(top_k=2, score="sigmoid", scale=2.0, balance="bias", bias_rate=0.1),
        pattern=(DENSE, LayerKind(), LayerKind(), LayerKind()),
    ),
    "dense and experts, cut": tiny_model(
        num_layers=5,
        num_experts=4,
        expert_dim=8,
        routing=Routing(top_k=1, balance_weight=0.1),
        pattern=(DENSE, LayerKind(window=3)),
        activation="gelu_tanh",
    ),
    "looped experts": tiny_model(
        num_layers=4,
        loops=2,
        num_experts=4,
        expert_dim=8,
        routing=Routing(top_k=4, z_loss=0.01),
        pattern=(LayerKind(), DENSE),
        norm_placement="both",
    ),
}

# Growths that copy three layers, with the source layer of every target layer.
COPIES = {
    "stack": (Stack(2), (0, 1, 2, 0, 1, 2)),
    "interleave": (Interleave(2), (0, 0, 1, 1, 2, 2)),
    "layer map": (LayerMap((0, 1, 1, 2, 1, 2)), (0, 1, 1, 2, 1, 2)),
    "pattern": (LayerMap("12-3*2-23"), (0, 1, 2, 2, 1, 2)),
    "upscale": (DepthUpscale(1), (0, 1, 1, 2)),
    "middle block": (InsertBlock(1), (0, 1, 1, 2)),
    "last block": (InsertBlock(1, at="last"), (0, 1, 2, 2)),
    "center, odd": (InsertBlock(1, at="center"), (0, 1, 1, 2)),
    "chain of depth": (chain(Stack(3), LayerMap((0, 1, 2, 5, 7, 8))), (0, 1, 2, 2, 1, 2)),
}
HALF_MORE = Fraction(3, 2)

# Variants of every operator, for models from `tiny_model`.
GROWTHS = {name: growth for name, (growth, _) in COPIES.items()} | {
    "depth zero": DepthZero(2),
    "depth zero, stacked, fresh": DepthZero(2, order="stack", rest="fresh"),
    "depth fresh": DepthFresh(2),
    "depth random": DepthRandom(2, mask_tokens=128),
    "depth random, stacked, copies": DepthRandom(2, 128, order="stack", init="copy"),
    "depth random, bottom up": DepthRandom(2, 128, phases="bottom_up"),
    "split": WidthSplit(embed=2, mlp=2, heads=2),
    "split, uneven": WidthSplit(embed=2, mlp=2, heads=2, split="uneven"),
    "split, noise": WidthSplit(embed=2, mlp=2, heads=2, noise=0.3),
    "split, odd ratios": WidthSplit(embed=HALF_MORE, mlp=Fraction(6, 5), heads=3, kv_heads=1),
    "split, next layer": WidthSplit(embed=2, mlp=2, heads=2, new_units="next_layer"),
    "width zero": WidthZero(embed=HALF_MORE, mlp=2, heads=2),
    "width zero, channels alone": WidthZero(embed=2),
    "width zero, queries alone": WidthZero(mlp=HALF_MORE, heads=2, kv_heads=1),
    "width random": WidthRandom(embed=HALF_MORE, mlp=2, heads=2, mask_tokens=128),
    "width random, copies": WidthRandom(
        embed=2, mlp=2, heads=2, mask_tokens=128, phases="together", init="copy"
    ),
    "learn depth": Learn(2),
    "learn width": Learn(embed=HALF_MORE, mlp=2, heads=2),
    "learn both": Learn(2, embed=2, mlp=2, heads=2),
    "noise": Noise(0.2),
    "shrink": Shrink(0.4),
    "shrink, pad, perturb": chain(Shrink(0.4), WidthZero(embed=2, mlp=2, heads=2), Noise(0.2)),
    "chain of both": chain(WidthSplit(embed=2, mlp=2, heads=2, split="uneven"), DepthZero(2)),
    "chain with noise": chain(WidthSplit(embed=2, mlp=2, heads=2), Stack(2), Noise(0.2)),
    "chain of masks": chain(DepthRandom(2, 128), WidthRandom(mlp=2, mask_tokens=128)),
}

MESHES = {
    "one device": (MeshConfig(), 1),
    "fsdp 8": (MeshConfig(fsdp=8), 8),
    "replica 2, fsdp 2, tensor 2": (MeshConfig(replica=2, fsdp=2, tensor=2), 8),
    "fsdp 4, tensor 2": (MeshConfig(fsdp=4, tensor=2), 8),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    """Returns a mesh from `MESHES`."""
    config, num_devices = MESHES[name]
    return build_mesh(config, jax.devices()[:num_devices])


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the drawings of reports, for tests of their words."""

    def save(self, out, **_):
        if isinstance(out, io.StringIO):
            out.write("<svg></svg>")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)


def described_mesh(device_kind: str, platform: str, **sizes: int) -> jax.sharding.AbstractMesh:
    """Returns a mesh of described devices, with size 1 along other axes."""
    axes = mesh_axes(MeshConfig(expert=sizes.get("expert", 1)))
    return jax.sharding.AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in axes),
        axes,
        axis_types=(jax.sharding.AxisType.Explicit,) * len(axes),
        abstract_device=jax.sharding.AbstractDevice(device_kind, None, platform),
    )


@functools.cache
def random_params(config: ModelConfig):
    """Returns parameters as numpy arrays, without compiling `init`; gains are near 1."""
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
    """Sets every mesh in turn."""
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(params=MODELS)
def config(request) -> ModelConfig:
    """Every model in turn."""
    return MODELS[request.param]


def random_batch(seed=0, *, accumulate=1, rows=8, seq_len=8, vocab_size=11) -> Batch:
    """Returns a batch with two documents per row, and weight 0 at document ends."""
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
    """Returns the first microbatch, with fields [B, T]."""
    return Batch(*(field[0] for field in batch))


def tiny_run(workdir="runs/test", **fields) -> Config:
    """Returns the config of a run with two stages; the second is twice as deep."""
    values = {
        "model": tiny_model(num_layers=6),
        "data": DataConfig(path="data/test", seq_len=8),
        "optimizer": AdamW(peak_learning_rate=1e-2),
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


def phase_of(config: ModelConfig, rate=1e-2, **fields) -> Phase:
    """Returns a phase that trains all parameters at a constant learning rate."""
    values = {
        "index": 0,
        "stage": 0,
        "fit": None,
        "source": config,
        "model": config,
        "growth": None,
        "optimizer": AdamW(peak_learning_rate=rate),
        "optimizer_state": "reset",
        "average_checkpoints": 1,
        "reparameterizations": (),
        "trained_layers": None,
        "mesh": MeshConfig(),
        "seq_len": 8,
        "mixture": Mixture(weights=(1.0,)),
        "part": 0,
        "earlier_tokens": 0,
        "batch_size": 8,
        "accumulate": 1,
        "moment_memory": "device",
        "num_steps": 10,
        "learning_rate": LearningRate(
            shape="constant",
            peak=rate,
            warmup_tokens=0.0,
            decay_start=640.0,
            decay_tokens=0.0,
            final_fraction=0.1,
            first_tokens=0.0,
            tokens_per_step=64.0,
        ),
        "parameter_rates": None,
        "moment_starts": None,
        "start": Counts(),
        "per_step": Counts(tokens=64, examples=8),
        "waypoint": Waypoint(step=0, counts=Counts()),
    }
    return Phase(**(values | fields))


def equations(jaxpr):
    """Yields every equation in a jaxpr and in nested jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params):
            if isinstance(inner, ClosedJaxpr):
                yield from equations(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                yield from equations(inner)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Returns a function that runs a command: exit code, stdout and stderr."""

    def call(main, *args):
        monkeypatch.setattr("sys.argv", ["command", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call
