"""Names and descriptions of devices."""

import importlib.metadata
import re
import types

import pytest

from stackjax.accelerators import topology
from stackjax.accelerators.devices import GPUS, DeviceGroup, parse_devices
from stackjax.accelerators.speeds import speeds_of
from stackjax.model.flops import _PEAK_FLOPS
from stackjax.runtime.errors import UserError

NAMES = {
    "v5p:2x2x2": DeviceGroup(name="v5p", sizes=(2, 2, 2)),
    "v5e:16x16*2": DeviceGroup(name="v5e", sizes=(16, 16), num_slices=2),
    "h100:8": DeviceGroup(name="h100", sizes=(8,)),
    "h200:8x4": DeviceGroup(name="h200", sizes=(8, 4)),
    "a100-40:1": DeviceGroup(name="a100-40", sizes=(1,)),
}


@pytest.mark.parametrize("text", NAMES)
def test_device_names_are_parsed_and_shown_alike(text):
    assert parse_devices(text) == NAMES[text]
    assert str(NAMES[text]) == text


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("", "v5p:2x2x2"),
        ("h100", "h100:8"),
        ("h100:8 ", "h100:8"),
        ("h800:8", "h100, h200"),
        ("h100:0", "at least 1"),
        ("v5e:16x16*0", "at least 1"),
        ("v5e:2x2x2", "v5e:2x2"),
        ("v5p:8", "v5p:2x2x2"),
        ("h100:8*2", "h100:8x4"),
        ("h100:8x2x2", "h100:8x4"),
    ],
)
def test_wrong_device_name_is_refused_with_the_way_out(text, way_out):
    with pytest.raises(UserError, match=re.escape(f"--devices is {text!r}; ")) as caught:
        parse_devices(text)
    assert way_out in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GPUS)
def test_described_gpu_has_a_known_peak_memory_and_bandwidth(name):
    group = parse_devices(f"{name}:8")
    kind = re.search(r'device_description_str: "(.*)"', topology.target_description(group))
    assert kind is not None and kind[1] in _PEAK_FLOPS
    assert 40e9 < topology.target_number(group, "device_memory_size") < 200e9
    assert 1.5e12 < topology.target_number(group, "memory_bandwidth") < 8e12


def test_gpu_may_have_its_own_description(tmp_path):
    target = tmp_path / "mine.gpu_target_config.pbtxt"
    h100 = topology.target_description(parse_devices("h100:8"))
    target.write_text(h100.replace("device_memory_size: 8", "device_memory_size: 1"))
    group = parse_devices("h100:8", target)
    assert topology.target_number(group, "device_memory_size") < 20e9
    assert topology.target_description(group) == target.read_text()


@pytest.mark.parametrize(
    ("text", "content", "said"),
    [
        ("v5p:2x2x2", "", "leave it out for TPUs"),
        ("h100:8", None, "cannot be read"),
        ("h100:8", "name: 'a GPU'", "which has no device_memory_size"),
    ],
)
def test_wrong_description_is_refused(text, content, said, tmp_path):
    target = tmp_path / "mine.pbtxt"
    if content is not None:
        target.write_text(content)
    with pytest.raises(UserError, match=said):
        topology.usable_memory(parse_devices(text, target), [])


def test_gpu_without_a_known_peak_is_refused():
    device = types.SimpleNamespace(platform="cuda", device_kind="NVIDIA Z9")
    with pytest.raises(UserError, match="NVIDIA Z9"):
        speeds_of(parse_devices("h100:8"), device, 64)


def test_gpu_memory_is_the_process_share(monkeypatch):
    group = parse_devices("h100:8")
    total = topology.target_number(group, "device_memory_size")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert topology.usable_memory(group, []) == int(0.75 * total)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert topology.usable_memory(group, []) == int(0.9 * total)


@pytest.mark.parametrize(("text", "extra"), [("v5p:2x2x2", "tpu"), ("h100:8", "cuda13")])
def test_missing_compiler_is_one_line_with_the_package(monkeypatch, text, extra):
    monkeypatch.setattr(topology, "_is_installed", lambda package: False)
    version = importlib.metadata.version("jax")
    with pytest.raises(UserError, match=re.escape(f'pip install "jax[{extra}]=={version}"')):
        topology.described_devices(parse_devices(text))
