"""Preflight checks of a run, without allocating device memory."""

import dataclasses
import re

import jax
import optax
import pytest
from conftest import MESHES, mesh_of, tiny_model, tiny_run

from stackjax import model
from stackjax.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    Stage,
)
from stackjax.data.config import DataConfig
from stackjax.growth import Stack
from stackjax.optimizers import AdamW, Muon, Optimizer
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import compile_step
from stackjax.training.expand import expand
from stackjax.training.preflight import check, check_backend
from stackjax.training.train_state import init_state


def stage(**fields):
    return {"stages": (Stage(**({"tokens": 640, "batch_size": 8} | fields)),)}


def evaluation(**fields):
    values = {"every_tokens": 64, "num_sequences": 8, "batch_size": 8} | fields
    return {"evaluation": EvaluationConfig(**values)}


def checkpoints(**fields):
    return {"checkpoints": CheckpointConfig(**({"every_tokens": 128} | fields))}


def optimizer(kind=AdamW, **fields):
    values = {"peak_learning_rate": 1e-2, "moments_dtype": "bfloat16"} | fields
    return {"optimizer": kind(**values)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Belief(Optimizer):
    def build(self, axes):
        return optax.scale_by_belief()


def keeping(growth):
    """Returns two stages; the second keeps the optimizer state."""
    lengths = {"tokens": 640, "batch_size": 8}
    return {
        "stages": (Stage(**lengths), Stage(**lengths, growth=growth, optimizer_state="keep"))
    }


TENSOR = {"mesh": MeshConfig(tensor=4)}

# Invalid runs on eight devices and the expected messages: field, value, rule, fix.
ERRORS = {
    "mesh": (
        {"mesh": MeshConfig(replica=2, fsdp=2)},
        "mesh {'replica': 2, 'fsdp': 2, 'context': 1, 'tensor': 1} does not fit 8 devices; the "
        "sizes must multiply to 8, or set one of them to -1.",
    ),
    "mesh of a stage": (
        stage(mesh=MeshConfig(fsdp=3, tensor=-1)),
        "'fsdp': 3, 'context': 1, 'tensor': -1} does not fit 8 devices",
    ),
    "batch": (
        stage(batch_size=12),
        "stages.0.batch_size is 12, which does not divide into accumulate 1 x 8 shards of "
        "the batch (mesh replica x fsdp); use a multiple of 8.",
    ),
    "microbatches": (
        stage(batch_size=24, accumulate=2),
        "stages.0.batch_size is 24, which does not divide into accumulate 2 x 8 shards of "
        "the batch (mesh replica x fsdp); use a multiple of 16.",
    ),
    "evaluation batch": (
        evaluation(batch_size=12),
        "evaluation.batch_size is 12, which does not divide over 8 shards of the batch; use "
        "a multiple of 8.",
    ),
    "sequence": (
        {"data": DataConfig(path="data/test", seq_len=12), "mesh": MeshConfig(context=8)},
        "data.seq_len is 12 in stage 0, which does not divide over 8 shards of the sequence "
        "(mesh context); use a multiple of 8.",
    ),
    "embed": (
        {"model": tiny_model(num_layers=6, embed_dim=20)},
        "model.embed_dim is 20 in stage 0, which does not divide over 8 shards (mesh fsdp x "
        "context); change one of them.",
    ),
    "kv heads": (
        TENSOR,
        "model.num_kv_heads is 2 in stage 0, which does not divide over 4 shards",
    ),
    "heads": (
        {"model": tiny_model(num_layers=6, num_heads=6), **TENSOR},
        "model.num_heads is 6 in stage 0, which does not divide over 4 shards",
    ),
    "mlp": (
        {"model": tiny_model(num_layers=6, mlp_dim=18, num_kv_heads=4), **TENSOR},
        "model.mlp_dim is 18 in stage 0, which does not divide over 4 shards",
    ),
    "vocabulary": (
        {"model": tiny_model(num_layers=6, num_kv_heads=4, vocab_multiple=1), **TENSOR},
        "model.vocab_size, padded to model.vocab_multiple, is 11 in stage 0",
    ),
    "kept checkpoints": (
        checkpoints(keep_every_tokens=200),
        "checkpoints.keep_every_tokens is 200; it must be a multiple of "
        "checkpoints.every_tokens 128.",
    ),
    "no checkpoint kept": (
        checkpoints(keep_last=0),
        "checkpoints.keep_last is 0; it must be at least 1.",
    ),
    "no microbatch": (
        stage(accumulate=0),
        "stages.0.accumulate is 0; it must be at least 1.",
    ),
    "no batch": (stage(batch_size=0), "stages.0.batch_size is 0; it must be at least 1."),
    "never evaluated": (
        evaluation(every_tokens=0),
        "evaluation.every_tokens is 0; it must be at least 1.",
    ),
    "moments of unknown growth": (
        {"optimizer": Belief(peak_learning_rate=1e-2), **keeping(Stack(2))},
        "stages.1.optimizer_state is 'keep', but the optimizer state has an array .mu[",
    ),
    "never logged": (
        {"logging": LoggingConfig(every_tokens=0)},
        "logging.every_tokens is 0; it must be at least 1.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_invalid_runs_are_rejected_with_a_fix(name):
    fields, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        check(tiny_run(**fields), 8)


# Settings a CPU does not support, and the expected messages.
NOT_HERE = {
    "accelerator": (
        {"platform": "accelerator"},
        "platform is 'accelerator', but JAX has only the CPU here, on which this run would "
        "crawl; run it on a GPU or TPU (`pip install -r requirements-cuda.txt`, or "
        "`-tpu.txt`), or go on regardless with `--platform any`.",
    ),
    "cudnn": (
        {"model": tiny_model(attention="cudnn")},
        "model.attention is 'cudnn', which needs an NVIDIA GPU, but JAX runs on cpu here; "
        "use `--model.attention auto`.",
    ),
    "splash": (
        {"model": tiny_model(attention="splash")},
        "model.attention is 'splash', which needs a TPU, but JAX runs on cpu here",
    ),
    "cudnn in float32": (
        {"model": tiny_model(attention="cudnn", compute_dtype="float32")},
        "model.attention is 'cudnn', which takes bfloat16 alone, and model.compute_dtype is "
        "'float32'; use bfloat16, or `--model.attention xla`.",
    ),
}


@pytest.mark.parametrize("name", NOT_HERE)
def test_accelerator_features_are_rejected_on_cpu_with_a_fix(name):
    fields, message = NOT_HERE[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_backend(tiny_run(**fields))


def test_run_for_any_platform_is_accepted_on_cpu():
    for attention in ("auto", "xla"):
        check_backend(tiny_run(model=tiny_model(attention=attention)))


@pytest.mark.parametrize(
    ("platform", "device_kind", "kernel"),
    [("gpu", "NVIDIA H200", "cudnn"), ("tpu", "TPU v5 lite", "splash")],
)
def test_accelerator_accepts_only_its_own_attention_kernel(platform, device_kind, kernel):
    device = jax.sharding.AbstractDevice(device_kind, None, platform)
    for attention in ("auto", "xla", kernel):
        model = tiny_model(attention=attention)
        check_backend(tiny_run(model=model, platform="accelerator"), device)
    (other,) = {"cudnn", "splash"} - {kernel}
    with pytest.raises(ValueError, match=f"'{other}', which needs .* runs on {platform}"):
        check_backend(tiny_run(model=tiny_model(attention=other)), device)


def test_later_stages_are_checked_before_the_run():
    stages = (*tiny_run().stages, Stage(tokens=64, batch_size=7))
    with pytest.raises(ValueError, match=r"stages\.2\.batch_size is 7"):
        check(tiny_run(stages=stages), 8)


def test_states_larger_than_device_memory_are_rejected():
    config = tiny_run()
    estimates = check(config, 8)
    needed = [estimate.state_bytes + estimate.gradient_bytes for estimate in estimates]
    assert needed[1] > needed[0]
    check(config, 8, memory=needed[1])
    with pytest.raises(ValueError, match=r"stages.1: .* GiB on each device.*more devices"):
        check(config, 8, memory=needed[1] - 1)


@pytest.mark.sample(3)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_step_with_full_remat_needs_little_more_memory_than_its_gradients(accumulate):
    run = tiny_run(
        model=tiny_model(embed_dim=256, mlp_dim=1024, num_layers=6, remat="full"),
        mesh=MeshConfig(replica=8, fsdp=1),
        **stage(batch_size=8 * accumulate, accumulate=accumulate),
    )
    (estimate,) = check(run, 8)
    temporary = compile_step(run, estimate.phase).memory_analysis().temp_size_in_bytes
    assert estimate.gradient_bytes <= temporary < 1.5 * estimate.gradient_bytes


def test_bfloat16_moments_take_half_the_bytes_per_device():
    # Saving two bytes on each of two moments equals the gradient's four bytes.
    for wide, narrow in zip(
        check(tiny_run(), 8), check(tiny_run(**optimizer()), 8), strict=True
    ):
        gradients = 2 if wide.phase.accumulate > 1 else 1
        assert gradients * (wide.state_bytes - narrow.state_bytes) == wide.gradient_bytes
        assert narrow.gradient_bytes == wide.gradient_bytes


SLOW_DECAYS = [(AdamW, "b2", 0.99), (AdamW, "b1", 0.985), (Muon, "momentum", 0.99)]


@pytest.mark.parametrize(("kind", "field", "decay"), SLOW_DECAYS)
def test_moment_decay_too_slow_for_bfloat16_is_rejected(kind, field, decay):
    with pytest.raises(UserError, match=rf"optimizer\.{field} is {decay}, .*bfloat16.*0\.98"):
        optimizer(kind, **{field: decay})


def test_slow_moment_decay_is_accepted_for_float32():
    optimizer(b2=0.999, moments_dtype="float32")
    optimizer(Muon, momentum=0.999, moments_dtype="float32")


@pytest.mark.parametrize("name", MESHES)
def test_estimated_bytes_equal_the_bytes_on_each_device(name):
    mesh_config, num_devices = MESHES[name]
    run = tiny_run(mesh=mesh_config)
    mesh = mesh_of(name)
    for estimate in check(run, num_devices):
        config = estimate.phase.model
        with jax.set_mesh(mesh):
            tx = run.optimizer.build(model.logical_axes(config))
            abstract = jax.eval_shape(lambda: init_state(config, tx, jax.random.key(0)))  # noqa: B023
            layout = on_mesh(abstract, mesh)
            state = jax.jit(
                lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), layout),  # noqa: B023
                out_shardings=jax.tree.map(lambda x: x.sharding, layout),
            )()
        for device in mesh.devices.flat:
            shards = [
                shard.data.nbytes
                for leaf in jax.tree.leaves(state)
                for shard in leaf.addressable_shards
                if shard.device == device
            ]
            assert sum(shards) == estimate.state_bytes
        assert jax.tree.structure(estimate.state) == jax.tree.structure(state)


def test_estimates_of_a_huge_model_allocate_nothing():
    huge = tiny_model(num_layers=4096, embed_dim=2**16, mlp_dim=2**18)
    before = {id(array) for array in jax.live_arrays()}
    (_, estimate) = check(tiny_run(model=huge), 8)
    # At least 4096 layers x 3 x 2**34 float32 weights, in three copies.
    assert estimate.state_bytes > 3 * 4 * 4096 * 3 * 2**34 / 8
    assert {id(array) for array in jax.live_arrays()} <= before


def test_each_phase_is_estimated_on_its_own_mesh():
    stages = (
        Stage(tokens=64, batch_size=8),
        Stage(tokens=64, batch_size=8, mesh=MeshConfig(replica=8, fsdp=1)),
        Stage(tokens=64, batch_size=8, growth=Stack(factor=2)),
    )
    config = tiny_run(stages=stages)
    sharded, replicated, grown = (e.gradient_bytes for e in check(config, 8))
    # Replication makes all but the unsharded gains eight times larger.
    assert 2 * sharded < replicated <= 8 * sharded
    assert 1.5 * sharded < grown < 2 * sharded
    assert [phase.mesh.replica for phase in expand(config)] == [-1, 8, -1]
