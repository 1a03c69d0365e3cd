"""Costs read from the text of compiled programs."""

import json
from pathlib import Path

import pytest

from stackjax.accelerators.costs import Collective, program_costs
from stackjax.accelerators.groups import collective_groups
from stackjax.accelerators.hlo import Shape, parse_module
from stackjax.accelerators.loops import count_runs

# A loop of three products, each with a gather of the weights.
GPU = (Path(__file__).parent / "gpu.hlo").read_text()

STATED = GPU.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
UNKNOWN = GPU.replace("constant(3)", 'custom-call(), custom_call_target="now"')

# A product, attention and a reduce-scatter.
TPU = (Path(__file__).parent / "tpu.hlo").read_text()


@pytest.mark.parametrize(
    ("text", "runs", "unknown"), [(GPU, 3, 0), (STATED, 3, 0), (UNKNOWN, 1, 1)]
)
def test_loops_count_from_their_counter_or_the_stated_number(text, runs, unknown):
    found = count_runs(parse_module(text))
    assert (found.counts["body"], found.unknown_loops) == (runs, unknown)
    assert found.counts["main"] == 1 and "fused_add" not in found.counts


def test_gpu_products_traffic_and_collectives_are_multiplied_by_loop_iterations():
    costs = program_costs(parse_module(GPU), num_devices=8, devices_per_host=4)
    assert costs.dot_flops == 3 * 2 * 4 * 16 * 8
    assert (costs.attention_flops, costs.forward_kernels) == (0, 0)
    # The fusion reads the product, a slice and the counter, and writes the sum. Counting and
    # comparing take 12 and 9 bytes.
    assert costs.elementwise_traffic == 3 * (64 + 128 + 4 + 64 + 12 + 9)
    assert costs.collectives == (
        Collective(
            kind="all-gather",
            is_synchronous=False,
            crosses_hosts=True,
            calls=3,
            wire_bytes=3 * 32 * 7,
        ),
        Collective(
            kind="all-reduce",
            is_synchronous=True,
            crosses_hosts=False,
            calls=3,
            wire_bytes=3 * 64,
        ),
    )
    assert costs.wire_bytes(is_synchronous=True) == 3 * 64


def test_tpu_convolution_is_a_product_and_splash_attention_is_counted_as_squares():
    costs = program_costs(parse_module(TPU), num_devices=4, devices_per_host=4)
    assert costs.dot_flops == 2 * 4 * 16 * 8
    assert costs.attention_flops == 2 * (2 * 2 * 3 * 256**2 * 64)
    assert costs.computed_attention_flops == costs.attention_flops / 2
    assert costs.forward_kernels == 1
    (reduction,) = costs.collectives
    assert (reduction.kind, reduction.is_synchronous) == ("reduce-scatter", True)
    assert reduction.wire_bytes == 512 * 3 / 4


SCORES = {"intermediate_tensor_shape": {"dimensions": ["2", "4", "8", "32"]}}
CUDNN = """
HloModule jit_attention

ENTRY %main (q: bf16[2,8,4,64], k: bf16[2,32,4,64]) -> bf16[2,8,4,64] {{
  %q = bf16[2,8,4,64] parameter(0)
  %k = bf16[2,32,4,64] parameter(1)
  ROOT %fmha = bf16[2,8,4,64] custom-call(%q, %k, %k), {config}
}}
"""


@pytest.mark.parametrize(("mask", "computed"), [("CAUSAL", 0.5), ("NO_MASK", 1.0)])
def test_cudnn_attention_computes_all_scores_under_an_explicit_mask(mask, computed):
    fields = json.dumps({"cudnn_fmha_backend_config": SCORES | {"mask_type": mask}})
    config = f'custom_call_target="__cudnn$fmhaSoftmax", backend_config={fields}'
    module = parse_module(CUDNN.format(config=config))
    costs = program_costs(module, num_devices=1, devices_per_host=1)
    assert costs.attention_flops == 2 * 2 * (2 * 4 * 8 * 32) * 64
    assert costs.computed_attention_flops == computed * costs.attention_flops


GATHER = """
%{name} (param.{name}: bf16[4,8]) -> bf16[16,8] {{
  %param.{name} = bf16[4,8] parameter(0)
  ROOT %all-gather.{name} = bf16[16,8] all-gather(%param.{name}), channel_id={channel}
}}
"""
STEPS = """
ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8] parameter(0)
  %async-collective-start.1 = bf16[16,8] fusion(%x), kind=kCustom, calls=%begin
  %fusion.1 = bf16[16,8] fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
  %async-collective-done.1 = bf16[16,8] fusion(%x), kind=kCustom, calls=%end
  ROOT %fusion.2 = bf16[16,8] fusion(%x), kind=kOutput, calls=%alone
}
"""


def test_asynchronous_gather_in_several_fusions_counts_once():
    names = {"begin": 7, "async_collective_fusion.1": 7, "end": 7, "alone": 8}
    gathers = [GATHER.format(name=name, channel=names[name]) for name in names]
    module = parse_module("HloModule m, num_partitions=4\n" + "".join(gathers) + STEPS)
    collectives = program_costs(module, 4, 4).collectives
    assert {each.is_synchronous: each.calls for each in collectives} == {False: 1, True: 1}
    assert {each.wire_bytes for each in collectives} == {3 * 4 * 8 * 2}


def test_arrays_in_on_chip_memory_are_no_memory_traffic():
    module = parse_module(TPU)
    (weights,) = module.computations["main"].instructions["w"].shapes
    assert weights == Shape("bf16", (16, 8), in_main_memory=False)
    assert weights.num_bytes == 256


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['x'=2,'y'=2], device_ids=([4]<=[2,2]T(1,0)) {'y'}",
            [[0, 2], [1, 3]],
        ),
        (
            "replica_groups=mesh['x'=1,'y'=2,'z'=2], device_ids=([2,2]T(1,0)) {'y'}",
            [[0, 1], [2, 3]],
        ),
        ("source_target_pairs={{0,1},{1,2}}", [[0, 1], [1, 2]]),
        ("to_apply=%add", [[0, 1, 2, 3]]),
    ],
)
def test_collective_groups_are_read_in_every_notation(text, groups):
    assert collective_groups(f", channel_id=1, {text}, dimensions={{0}}", 4) == groups


ALLOCATION = """
HloModule jit_stack

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8] parameter(0)
  %empty = f32[4,8] custom-call(), custom_call_target="AllocateBuffer"
  ROOT %sum = f32[4,8] add(%x, %empty)
}
"""


def test_allocated_memory_is_no_memory_traffic():
    costs = program_costs(parse_module(ALLOCATION), num_devices=1, devices_per_host=1)
    assert costs.traffic == 3 * 4 * 8 * 4


HOST = """
HloModule jit_update

ENTRY %main (moment: f32[4,8]) -> f32[4,8] {
  %moment = f32[4,8]{1,0:S(5)} parameter(0)
  %copy-start.1 = (f32[4,8]{1,0}, f32[4,8]{1,0:S(5)}, u32[]) copy-start(%moment)
  %copy-done.1 = f32[4,8]{1,0} copy-done(%copy-start.1)
  %new = f32[4,8]{1,0} negate(%copy-done.1)
  %copy-start.2 = (f32[4,8]{1,0:S(5)}, f32[4,8]{1,0}, u32[]) copy-start(%new)
  ROOT %copy-done.2 = f32[4,8]{1,0:S(5)} copy-done(%copy-start.2)
}
"""


def test_copies_to_and_from_the_host_count_apart():
    costs = program_costs(parse_module(HOST), num_devices=1, devices_per_host=1)
    assert costs.host_bytes == 2 * 4 * 8 * 4
    assert costs.elementwise_traffic == 2 * 4 * 8 * 4  # the negation
