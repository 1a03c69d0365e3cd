"""Safetensors files are compatible with the safetensors library."""

import json
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from stackjax.interop.tensors import (
    DTYPES,
    INDEX,
    ONE_FILE,
    TensorInfo,
    Tensors,
    check_finite,
    same_values,
    widest,
    write_tensors,
)

INFOS = st.dictionaries(
    st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8}){0,2}", fullmatch=True),
    st.builds(
        TensorInfo,
        st.lists(st.integers(1, 5), min_size=1, max_size=2).map(tuple),
        st.sampled_from(list(DTYPES)),
    ),
    min_size=1,
    max_size=8,
)


def values(infos):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=info.shape).astype(DTYPES[info.dtype])
        for name, info in infos.items()
    }


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(
        np.asarray(found).view(np.uint8), np.ascontiguousarray(expected).view(np.uint8)
    )


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(INFOS, st.integers(1, 400), st.booleans())
def test_written_tensors_are_readable_by_safetensors_and_stackjax(infos, shard_bytes, in_parts):
    expected = values(infos)
    tensors = list(expected.values())
    if in_parts:
        tensors = [row[None] for tensor in tensors for row in tensor]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tensors(folder, infos, iter(tensors), shard_bytes)
        files = sorted(folder.glob("*.safetensors"))
        found = {}
        for file in files:
            with safe_open(file, framework="np") as reader:
                assert reader.metadata() == {"format": "pt"}
                sizes = [infos[key].num_bytes for key in reader.keys()]  # noqa: SIM118
                assert len(sizes) == 1 or sum(sizes) <= shard_bytes
                found |= {key: (file.name, reader.get_tensor(key)) for key in reader.keys()}  # noqa: SIM118
        assert found.keys() == infos.keys()
        mapped = Tensors(folder)
        assert dict(mapped) == infos
        for key, tensor in expected.items():
            assert_same(found[key][1], tensor)
            assert_same(mapped.read(key), tensor)
        assert (folder / INDEX).exists() == (len(files) > 1)
        if len(files) > 1:
            index = json.loads((folder / INDEX).read_text())
            assert index["weight_map"] == {key: file for key, (file, _) in found.items()}
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        else:
            assert files[0].name == "model.safetensors"


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(INFOS)
def test_tensors_written_by_safetensors_are_readable(infos):
    expected = values(infos)
    with tempfile.TemporaryDirectory() as name:
        save_file(expected, Path(name) / "model.safetensors", {"format": "pt", "by": "another"})
        found = Tensors(Path(name))
        assert dict(found) == infos
        for key, tensor in expected.items():
            assert_same(found.read(key), tensor)


def test_integer_tensors_are_refused(tmp_path):
    save_file({"w": np.zeros((2, 2), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"w in .* is of type I8; .*F64, F32, BF16, F16"):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("F32",), "F32"),
        (("BF16",), "BF16"),
        (("BF16", "F32"), "F32"),
        (("BF16", "F16"), "F32"),
        (("F16", "F64"), "F64"),
    ],
)
def test_widest_type_represents_all_values(dtypes, expected):
    assert widest(dtypes) == expected


def write_shards(folder, shards, weight_map):
    """Writes safetensors files and an index."""
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


OLD, NEW = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
BASE, OVERLAY = "model-00001-of-00001.safetensors", "model-overlay.safetensors"


def test_tensor_is_read_from_the_indexed_file(tmp_path):
    write_shards(
        tmp_path,
        {BASE: {"a": OLD, "b": OLD}, OVERLAY: {"a": NEW}},
        {"a": OVERLAY, "b": BASE},
    )
    tensors = Tensors(tmp_path)
    assert_same(tensors.read("a"), NEW)
    assert_same(tensors.read("b"), OLD)


def test_later_duplicate_of_an_indexed_tensor_is_refused(tmp_path):
    # transformers reads the tensor from the last file.
    write_shards(
        tmp_path,
        {BASE: {"a": NEW, "b": OLD}, OVERLAY: {"a": OLD, "c": OLD}},
        {"a": BASE, "b": BASE, "c": OVERLAY},
    )
    with pytest.raises(ValueError, match=r"overlay.* has another copy of a, listed in "):
        Tensors(tmp_path)


def test_index_with_other_file_types_is_refused(tmp_path):
    # transformers reads other files as pickles.
    write_shards(tmp_path, {"weights": {"a": NEW}}, {"a": "weights"})
    with pytest.raises(ValueError, match=r"a in 'weights', .*\*.safetens"):
        Tensors(tmp_path)


def test_single_file_has_priority_over_an_index(tmp_path):
    write_shards(tmp_path, {BASE: {"a": OLD}}, {"a": BASE})
    save_file({"a": NEW}, tmp_path / ONE_FILE)
    assert_same(Tensors(tmp_path).read("a"), NEW)


def test_unindexed_file_is_not_opened(tmp_path):
    write_shards(tmp_path, {BASE: {"a": NEW}}, {"a": BASE})
    (tmp_path / "model-zzz.safetensors").write_bytes(b"no tensors")
    assert_same(Tensors(tmp_path).read("a"), NEW)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2**21, -1])
def test_single_non_finite_number_is_found(dtype, value, place):
    tensor = np.zeros(2**21 + 5, dtype)
    largest = np.array(np.inf, dtype).view(f"u{dtype.itemsize}") - 1
    tensor[1] = largest.view(dtype)
    check_finite(tensor, "a", "here")
    tensor[place] = value
    with pytest.raises(ValueError, match="a in here has NaN or infinity"):
        check_finite(tensor, "a", "here")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_same_values_compares_across_types(dtype):
    tensor = (np.arange(2**18) % 100).astype(dtype).reshape(2**16, 4)
    other = tensor.astype(np.float64)
    assert same_values(tensor, other)
    other[-1, -1] += 1
    assert not same_values(tensor, other)
