"""Lowering of the paper's 1.1B train step for devices that this process lacks."""

import dataclasses
import functools
import re

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn_attention
import jax._src.dispatch as dispatch
import pytest
from conftest import described_mesh

from stackjax.config import Config
from stackjax.config_file import load_config
from stackjax.model.layer_kind import LayerKind
from stackjax.model.routing_config import Routing
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import abstract_batch, abstract_state, jit_step
from stackjax.training.compiler_options import COMPILER_OPTIONS
from stackjax.training.expand import expand

# For each platform: a device kind, the type of products, and the attention kernel's forward and
# backward calls.
PLATFORMS = {
    "tpu": (
        ("TPU v5", "tpu"),
        "bf16",
        [
            r"@tpu_custom_call\(.*splash_mha_fwd_(segmented_)?residuals",
            r"@tpu_custom_call\(.*splash_mha_dq_(segmented_)?no_residuals",
            r"@tpu_custom_call\(.*splash_mha_dkv_(segmented_)?no_residuals",
        ],
    ),
    "cuda": (
        ("NVIDIA H100 80GB HBM3", "gpu"),
        "bf16",
        [
            r"@__cudnn\$fmha(ScaleBias)?Softmax\(",
            r"@__cudnn\$fmha(ScaleBias)?SoftmaxBackward\(",
        ],
    ),
    "cpu": (("cpu", "cpu"), "f32", []),
}
# Stage 0 has 6 layers. Stage 1 has 24 layers and masks documents.
STAGES = {0: (), 1: ("--data.mask-documents",)}
CALL = r"stablehlo.custom_call @(tpu_custom_call|__cudnn)"
# Products with weights have no batch dimensions, unlike products within attention.
PRODUCT = (
    r"stablehlo.dot_general %\w+, %\w+, contracting_dims.* : "
    r"\(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)"
)


@pytest.fixture(autouse=True)
def _without_devices(monkeypatch):
    """Lowers cuDNN calls without a GPU, whose cuDNN version JAX would check."""
    monkeypatch.setattr(cudnn_attention, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(dispatch, "prim_requires_devices_during_lowering", set())


def lowered(platform: str, stage: int, *overrides: str) -> str:
    """Returns the text of a stage's train step, lowered for eight devices of a platform."""
    return lowered_step(platform, stage, config_with(*overrides))


def config_with(*overrides: str) -> Config:
    return load_config("test", ["--config", "configs/gstack_1b.py", *overrides])


@functools.cache
def lowered_step(platform: str, stage: int, config: Config, expert: int = 1) -> str:
    phase = expand(config)[stage]
    experts = {} if expert == 1 else {"expert": expert}
    mesh = described_mesh(*PLATFORMS[platform][0], fsdp=4 // expert, tensor=2, **experts)
    with jax.sharding.use_abstract_mesh(mesh):
        inputs = on_mesh(jax.eval_shape(lambda: phase.step_inputs), mesh)
        state = on_mesh(abstract_state(phase), mesh)
        batch = abstract_batch(config, phase, mesh)
        trace = jit_step(phase).trace(inputs, state, batch)
        return trace.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.sample(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_step_has_the_attention_kernel_of_the_meshs_devices(platform, stage):
    text = lowered(platform, stage, *STAGES[stage])
    _, _, calls = PLATFORMS[platform]
    assert bool(re.search(CALL, text)) == bool(calls)
    for call in calls:
        assert re.search(call, text), call


@pytest.mark.sample(2)
@pytest.mark.parametrize(("remat", "num_calls"), [("dots", 1), ("lean", 1), ("full", 2)])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_forward_attention_runs_once_per_layer_unless_everything_is_recomputed(
    platform, remat, num_calls
):
    forward, backward = {
        "tpu": (r"@tpu_custom_call\(.*splash_mha_fwd_", r"@tpu_custom_call\(.*splash_mha_dq_"),
        "cuda": (r"@__cudnn\$fmhaSoftmax\(", r"@__cudnn\$fmhaSoftmaxBackward\("),
    }[platform]
    text = lowered(platform, 0, f"--model.remat={remat}")
    num_backward = len(re.findall(backward, text))
    assert num_backward > 0
    assert len(re.findall(forward, text)) == num_calls * num_backward


# Layers per iteration, layers in a period, and the barriers. 6 layers are two periods of 3, or
# a period of 5 in two runs with equal kinds and a cut one.
@pytest.mark.parametrize(
    ("scan_unroll", "period", "has_barrier"),
    [
        (1, 0, {False}),
        (6, 0, {True}),
        (1, 3, {False}),
        (4, 3, {False}),
        (6, 3, {True}),
        (1, 5, {False, True}),
    ],
)
def test_remat_has_a_barrier_where_no_loop_over_layers_remains(
    monkeypatch, scan_unroll, period, has_barrier
):
    barriers, checkpoint = [], jax.checkpoint

    def record(function, *, policy=None, prevent_cse):
        if policy is not None:  # a whole layer, not an activation
            barriers.append(prevent_cse)
        return checkpoint(function, policy=policy, prevent_cse=prevent_cse)

    monkeypatch.setattr(jax, "checkpoint", record)
    config = config_with(f"--model.scan-unroll={scan_unroll}", "--model.remat=lean")
    pattern = tuple(LayerKind(window=64 + (i + 1 == period)) for i in range(period))
    shape = dataclasses.replace(config.model, num_layers=6, pattern=pattern)
    config = dataclasses.replace(config, model=shape, stages=config.stages[:1])
    lowered_step.__wrapped__("tpu", 0, config)
    assert set(barriers) == has_barrier


def test_head_is_cast_and_gathered_once_per_microbatch():
    text = lowered("cuda", 0, "--model.loss-chunk=256")
    cast = r"stablehlo.convert .*\(tensor<2048x32000xf32>\) -> tensor<2048x32000xbf16>"
    # In the loop over microbatches, for all eight chunks.
    assert len(re.findall(cast, text)) == 1


def test_microbatches_are_computed_in_a_loop():
    assert config_with().stages[0].accumulate > 1
    one, many = lowered("cuda", 0, "--stages.0.accumulate=1"), lowered("cuda", 0)
    assert len(re.findall(PRODUCT, one)) == len(re.findall(PRODUCT, many)) > 0


@pytest.mark.parametrize("platform", PLATFORMS)
def test_weight_products_have_the_compute_type_of_the_meshs_devices(platform):
    _, dtype, _ = PLATFORMS[platform]
    operands = re.findall(PRODUCT, lowered(platform, 0, *STAGES[0]))
    # Forward and twice backward: at least seven products in a layer, and the head's.
    assert len(operands) >= 3 * 8
    assert set(operands) == {(dtype, dtype)}


@pytest.mark.parametrize(("name", "value"), COMPILER_OPTIONS["gpu"].items())
def test_gpu_compiler_options_exist_and_have_valid_types(name, value):
    # Every XLA build has the GPU options. TPU options exist only in libtpu.
    program = jax.jit(lambda x: x + 1).lower(1.0)
    assert program.compile({name: value})(1.0) == 2.0
    with pytest.raises(Exception, match=f"{name}_"):
        program.compile({f"{name}_": value})


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_experts_have_grouped_products_and_exchanges_of_tokens(platform):
    config = config_with()
    model = dataclasses.replace(
        config.model, num_experts=8, expert_dim=1024, routing=Routing(top_k=2)
    )
    text = lowered_step(platform, 0, dataclasses.replace(config, model=model), expert=2)
    assert bool(re.search(r"chlo\.ragged_dot", text)) == (platform == "tpu")
    assert "stablehlo.all_to_all" in text
