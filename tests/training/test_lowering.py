"""Cross-platform lowering of the train step of the paper's 1.1B run."""

import re

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn_attention
import pytest

from stackjax.config_file import load_config
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import abstract_batch, abstract_state, jit_step, step_inputs
from stackjax.training.compiler_options import COMPILER_OPTIONS
from stackjax.training.expand import expand

OVERRIDES = [
    "--model.compute-dtype=bfloat16",
    "--model.scan-unroll=1",
    "--mesh.fsdp=4",
    "--mesh.tensor=2",
]
# For each platform: the attention kernel, and its forward and backward calls.
CALLS = {
    "tpu": (
        "splash",
        [
            r"@tpu_custom_call\(.*splash_mha_fwd_(segmented_)?residuals",
            r"@tpu_custom_call\(.*splash_mha_dq_(segmented_)?no_residuals",
            r"@tpu_custom_call\(.*splash_mha_dkv_(segmented_)?no_residuals",
        ],
    ),
    "cuda": (
        "cudnn",
        [
            r"@__cudnn\$fmha(ScaleBias)?Softmax\(",
            r"@__cudnn\$fmha(ScaleBias)?SoftmaxBackward\(",
        ],
    ),
}
# The exported module is only read, so these calls need no version guarantee.
ALLOWED = [
    jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmha{call}")
    for call in (
        "Softmax",
        "SoftmaxBackward",
        "ScaleBiasSoftmax",
        "ScaleBiasSoftmaxBackward",
    )
]


def lowered(platform: str, stage: int, overrides: list[str]) -> jax.export.Exported:
    """Returns the train step of a stage, lowered for eight devices of a platform."""
    config = load_config("test", ["--config", "configs/gstack_1b.py", *OVERRIDES, *overrides])
    phase = expand(config)[stage]
    mesh = build_mesh(phase.mesh)
    with jax.set_mesh(mesh):
        state = on_mesh(abstract_state(phase), mesh)
        export = jax.export.export(
            jit_step(phase), platforms=[platform], disabled_checks=ALLOWED
        )
        return export(step_inputs(phase), state, abstract_batch(config, phase, mesh))


# Stage 0 has 6 layers. Stage 1 has 24 layers and masks documents.
STAGES = {0: [], 1: ["--data.mask-documents"]}


@pytest.mark.sample(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("platform", CALLS)
def test_step_of_the_1b_run_lowers_to_the_platforms_attention_kernel(
    monkeypatch, platform, stage
):
    # cuDNN is not installed here, so its version check is replaced.
    monkeypatch.setattr(cudnn_attention, "check_cudnn_version", lambda: 91000)
    attention, calls = CALLS[platform]
    exported = lowered(platform, stage, [f"--model.attention={attention}", *STAGES[stage]])
    assert exported.nr_devices == 8
    module = exported.mlir_module()
    for call in calls:
        assert re.search(call, module), call


@pytest.mark.parametrize(("name", "value"), COMPILER_OPTIONS["gpu"].items())
def test_gpu_compiler_options_exist_and_have_valid_types(name, value):
    # Every XLA build has the GPU options. TPU options exist only in libtpu.
    program = jax.jit(lambda x: x + 1).lower(1.0)
    assert program.compile({name: value})(1.0) == 2.0
    with pytest.raises(Exception, match=f"{name}_"):
        program.compile({f"{name}_": value})
