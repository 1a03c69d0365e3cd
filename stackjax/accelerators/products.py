"""FLOPs of matrix products and attention kernels in a compiled program."""

import dataclasses
import json
import math
import re

import numpy as np

from stackjax.accelerators.hlo import Computation, Instruction, Module, Shape

_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GEMM_CONTRACTING = re.compile(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_SCORES = re.compile(r'"intermediate_tensor_shape":.*?"dimensions":\s*(\[[^\]]*\])')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
# Matrix products over all scores. Backward kernels compute the scores again.
_KERNELS = {
    "__cudnn$fmha": (2, True),
    "__cudnn$fmhaBackward": (5, False),
    "splash_fwd": (2, True),
    "splash_dq": (3, False),
    "splash_dkv": (4, False),
}


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A call of an attention kernel."""

    flops: float
    """FLOPs of all products over the scores of all queries and keys."""
    computed_flops: float
    """FLOPs that the kernel computes: the causal half, or all with an explicit mask."""
    is_forward: bool


def attention_products(
    computation: Computation, instruction: Instruction
) -> AttentionCall | None:
    """Returns an attention kernel's cost; None for any other instruction."""
    kernel = _attention_kernel(instruction)
    if kernel is None:
        return None
    products, is_forward = _KERNELS[kernel]
    operands = computation.operands(instruction)
    shapes = [shape for each in operands for shape in each.shapes]
    if kernel.startswith("__cudnn"):
        match = _SCORES.search(instruction.attributes)
        assert match is not None, "cuDNN attention states the shape of its scores"
        scores = math.prod(int(size) for size in json.loads(match[1]))
        head_dim = shapes[0].sizes[-1]
        is_causal = '"NO_MASK"' not in instruction.attributes
    else:
        # The mask's integer tables come before queries and keys.
        queries, keys, *_ = (each.sizes for each in shapes if _is_float(each))
        scores, head_dim, is_causal = math.prod(queries[:-1]) * keys[-2], queries[-1], True
    flops = products * 2 * scores * head_dim
    return AttentionCall(flops, flops / 2 if is_causal else flops, is_forward)


def _is_float(shape: Shape) -> bool:
    return shape.dtype.startswith(("f", "bf"))


def _attention_kernel(instruction: Instruction) -> str | None:
    """Returns the key of `_KERNELS` for an instruction; None for any other instruction."""
    match = _TARGET.search(instruction.attributes)
    if instruction.opcode != "custom-call" or match is None:
        return None
    if match[1].startswith("__cudnn$fmha"):
        return "__cudnn$fmhaBackward" if match[1].endswith("Backward") else "__cudnn$fmha"
    part = re.match(r"splash_mha_(fwd|dq|dkv)", instruction.name)
    return f"splash_{part[1]}" if part and match[1] == "tpu_custom_call" else None


def product_flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of an instruction's matrix products, those in a fusion included."""
    if instruction.opcode in ("fusion", "async-start"):
        return sum(
            product_flops(module, called, each)
            for called in module.called(instruction)
            for each in called.instructions.values()
        )
    if instruction.opcode == "dot":
        match = _CONTRACTING.search(instruction.attributes)
        return _dot_flops(computation, instruction, match[1] if match else "")
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    target = _TARGET.search(instruction.attributes)
    if instruction.opcode == "custom-call" and target and target[1].startswith("__cublas"):
        match = _GEMM_CONTRACTING.search(instruction.attributes)
        assert match is not None, "cuBLAS calls state their contraction"
        return _dot_flops(computation, instruction, match[1].replace('"', ""))
    return 0.0


def _dot_flops(computation: Computation, instruction: Instruction, contracting: str) -> float:
    left = computation.operands(instruction)[0].shapes[0].sizes
    contracted = math.prod(left[int(axis)] for axis in contracting.split(",") if axis.strip())
    return 2.0 * instruction.shapes[0].num_elements * contracted


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a convolution; TPU programs write matrix products in this way.

    Batch axes of a product become spatial axes with mostly padding, so only positions inside
    the input count.
    """
    left, right = (each.shapes[0].sizes for each in computation.operands(instruction)[:2])
    labels = _LABELS.search(instruction.attributes)
    assert labels is not None, "convolutions name their axes"
    window = _window(instruction.attributes)
    out, flops = instruction.shapes[0].sizes, 2.0
    flops *= right[labels[2].index("i")]
    flops *= out[labels[3].index("b")] * out[labels[3].index("f")]
    for axis in range(len(window.get("size", []))):
        label = str(axis)
        flops *= _positions(
            left[labels[1].index(label)],
            right[labels[2].index(label)],
            out[labels[3].index(label)],
            {name: values[axis] for name, values in window.items()},
        )
    return flops


def _window(attributes: str) -> dict[str, list[str]]:
    """Returns a convolution's window: each setting's values by spatial axis."""
    match = _WINDOW.search(attributes)
    pairs = (each.split("=") for each in match[1].split()) if match else ()
    return {name: values.split("x") for name, values in pairs}


def _positions(base: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Returns the pairs of output and kernel positions that meet an input, along one axis."""
    stride, dilation = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    spacing = int(window.get("lhs_dilate", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    positions = np.arange(out)[:, None] * stride - low + np.arange(kernel) * dilation
    is_inside = (positions >= 0) & (positions <= (base - 1) * spacing)
    return int(np.sum(is_inside & (positions % spacing == 0)))
