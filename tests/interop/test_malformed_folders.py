"""Every command refuses a malformed folder quickly, in one line, and writes nothing."""

import json
import os
import shutil
import struct
import time

import folders
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stackjax import convert, generate, grow, inspect
from stackjax.interop.tensors import INDEX, ONE_FILE

SECONDS = 5
HUGE, INFINITE = 10**30, json.loads("1e999")
WRONG = {
    "a size": (None, "16", 16.5, 16.0, True, [16], {}, -1, 0, 10**12, HUGE, np.nan, INFINITE),
    "a size, or none": ("2", 2.5, 2.0, True, [2], {"a": 2}, -2, 0, HUGE, np.nan),
    "a number": (None, "1e-6", True, [1e-6], -1.0, HUGE, np.nan, INFINITE),
    "a base": (None, "abc", True, [1], 0, -1e4, np.nan, INFINITE),
    "a flag": (None, "no", 0, 1, [True]),
    "a kind": (None, "evil", 5, ["llama"], {}, "", "a" * 10_000),
    "an activation": (None, "relu", 5, ["silu"], True),
    "a rotation": (
        *(["x"], "linear", 5, True, {"rope_type": ["llama3"]}, {"rope_type": "llama3"}),
        *({"rope_theta": "1e4"}, {"rope_theta": -1.0}, {"rope_theta": np.nan}, {"type": 5}),
        *(
            folders.LLAMA3 | {name: value}
            for name in ("factor", "low_freq_factor", "original_max_position_embeddings")
            for value in ("8", None, True, -1, 0, np.nan, [8])
        ),
    ),
    "types of layers": (5, "x", [1, "a"], ["full_attention"], [[], [], []], {"0": "x"}),
    "a type": ("int8", "../../x", 5, ["float32"], "float32\n"),
}
FIELDS = {
    "vocab_size": "a size",
    "hidden_size": "a size",
    "intermediate_size": "a size",
    "num_hidden_layers": "a size",
    "num_attention_heads": "a size",
    "max_position_embeddings": "a size",
    "num_key_value_heads": "a size, or none",
    "head_dim": "a size, or none",
    "rms_norm_eps": "a number",
    "rope_theta": "a base",
    "tie_word_embeddings": "a flag",
    "attention_bias": "a flag",
    "is_causal": "a flag",
    "model_type": "a kind",
    "hidden_act": "an activation",
    "rope_scaling": "a rotation",
    "rope_parameters": "a rotation",
    "layer_types": "types of layers",
    "dtype": "a type",
    "torch_dtype": "a type",
}
TEXTS = {
    "deep": '{"model_type":"llama","a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"model_type":"llama","a":' + "9" * 10_000 + "}",
    "empty": "",
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "cut": '{"model_type": "llama", "vocab',
    "not UTF-8": b'\xff{"model_type":"llama"}',
    "UTF-16": '{"model_type":"llama"}'.encode("utf-16"),
    "no kind": "{}",
    "large": '{"model_type":"llama","a":"' + "x" * 10**8 + '"}',
}
INDICES = {
    "outside": "../secret.safetensors",
    "absolute": "/etc/passwd",
    "a device": "/dev/zero",
    "far outside": "../../../../../../etc/passwd",
    "a pipe": "pipe",
    "a directory": "directory",
    "a loop of links": "loop",
    "a link outside": "link",
    "null byte": "a\0b",
    "long": "a" * 5000,
    "empty name": "",
    "dot": ".",
    "a number": 5,
    "a list": ["a"],
    "null": None,
    "absent": "absent.safetensors",
}
INDEX_TEXTS = {
    "a list": '["x"]',
    "null": "null",
    "no map": "{}",
    "an empty map": '{"weight_map": {}}',
    "a map that is a list": '{"weight_map": ["a", "b"]}',
    "a map that is a text": '{"weight_map": "a"}',
    "not UTF-8": b"\xff\xfe{}",
    "deep": "[" * 200_000,
    "cut": '{"weight_map": {"a"',
}
EMBEDDING = "model.embed_tokens.weight"


def header(shape=(4,), dtype="F32", offsets=(0, 16), **others):
    return {EMBEDDING: {"dtype": dtype, "shape": shape, "data_offsets": offsets}} | others


HEADERS = {
    "no header": (b"", 0, b""),
    "negative": (b"{}", 2**63, b""),
    "too long": (b"{}", 2**64 - 1, b""),
    "over 100 MB": (b"{}", 101 * 10**6, b""),
    "longer than the file": (b"{}", 90_000_000, b""),
    "not JSON": (b"xxxxxxxx", None, b""),
    "deep": (b"[" * 100_000, None, b""),
    "a huge shape": (header((2**40, 2**40)), None, b"\0" * 16),
    "a shape that overflows": (header((2**62, 4), offsets=(0, 0)), None, b""),
    "more than the file": (header((2**20,), offsets=(0, 2**22)), None, b"\0" * 16),
    "a negative shape": (header((-4,)), None, b"\0" * 16),
    "a scalar": (header((), offsets=(0, 4)), None, b"\0" * 4),
    "no elements": (header((0, 16), offsets=(0, 0)), None, b""),
    "an unknown type": (header(dtype="X9"), None, b"\0" * 16),
    "bytes": (header((16,), dtype="I8"), None, b"\0" * 16),
    "a gap": (
        header(b={"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}),
        None,
        b"\0" * 24,
    ),
    "an overlap": (
        header(b={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
        None,
        b"\0" * 16,
    ),
    "bytes after the end": (header(), None, b"\0" * 20),
    "bytes missing": (header(), None, b"\0" * 12),
}


def set_tensors(**values):
    """Returns a function that replaces tensors in a folder; None removes a tensor."""

    def change(path):
        tensors = load_file(path / ONE_FILE)
        for name, value in values.items():
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value
        save_file(tensors, path / ONE_FILE)

    return change


NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
WEIGHTS = {
    "an additional tensor": set_tensors(**{"evil.extra": np.zeros(3, np.float32)}),
    "a name that is a path": set_tensors(**{"../../evil": np.zeros(3, np.float32)}),
    "a missing tensor": set_tensors(**{NORM: None}),
    "a longer tensor": set_tensors(**{NORM: np.zeros(17, np.float32)}),
    "another rank": set_tensors(**{NORM: np.zeros((16, 1), np.float32)}),
    "a tensor of a missing layer": set_tensors(
        **{"model.layers.7.input_layernorm.weight": np.ones(16)}
    ),
    "integers": set_tensors(**{NORM: np.ones(16, np.int32)}),
}
NOT_FINITE = {
    "NaN": set_tensors(**{QUERY: np.full((16, 16), np.nan, np.float32)}),
    "infinity": set_tensors(**{NORM: np.full(16, np.inf, np.float32)}),
    "minus infinity in float16": set_tensors(**{NORM: np.full(16, -np.inf, np.float16)}),
    "one NaN": set_tensors(
        **{
            EMBEDDING: np.pad(
                np.zeros((60, 16), "f4"), ((0, 1), (0, 0)), constant_values=np.nan
            )
        }
    ),
}
IRREGULAR = {
    "pickles": lambda path: (path / ONE_FILE).rename(path / "pytorch_model.bin"),
    "no weights": lambda path: (path / ONE_FILE).unlink(),
    "an adapter": lambda path: (path / "adapter_config.json").write_text("{}"),
    "weights that are a directory": lambda path: (
        (path / ONE_FILE).unlink(),
        (path / ONE_FILE).mkdir(),
    ),
    "weights that are a link outside": lambda path: (
        (path / ONE_FILE).rename(path.parent / "secret.safetensors"),
        (path / ONE_FILE).symlink_to(path.parent / "secret.safetensors"),
    ),
    "a config that is a directory": lambda path: (
        (path / "config.json").unlink(),
        (path / "config.json").mkdir(),
    ),
    "a config that is a link outside": lambda path: (
        (path / "config.json").rename(path.parent / "config.json"),
        (path / "config.json").symlink_to(path.parent / "config.json"),
    ),
    "no lineage": lambda path: (path / "stackjax.json").write_text("{}"),
    "an empty lineage": lambda path: (path / "stackjax.json").write_text('{"lineage":[]}'),
    "a lineage of text": lambda path: (path / "stackjax.json").write_text('{"lineage":"abc"}'),
    "a lineage of numbers": lambda path: (path / "stackjax.json").write_text('{"lineage":[1]}'),
    "a deep lineage": lambda path: (path / "stackjax.json").write_text("[" * 100_000),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A valid folder, with a tokenizer as large as the vocabulary."""
    path = folders.write(tmp_path_factory.mktemp("whole"), "llama")
    vocabulary = {"</s>": 0} | {chr(64 + i): i for i in range(1, folders.VOCAB)}
    end = {"id": 0, "content": "</s>", "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "A"}
    tokenizer = {"version": "1.0", "added_tokens": [end], "model": model}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the valid folder."""
    return shutil.copytree(whole, tmp_path / "folder")


@pytest.fixture
def outcomes(folder, run_main):
    """Runs four commands on the folder and returns exit codes and error lines."""

    def call():
        target = folder.parent / "target"
        found = []
        for main, args in (
            (inspect.main, ()),
            (grow.main, (target, "--growth", "stack(2)")),
            (convert.main, (target,)),
            (generate.main, ("--prompt", "AB", "--max-tokens", "2")),
        ):
            shutil.rmtree(target, ignore_errors=True)
            start = time.process_time()
            code, _, err = run_main(main, folder, *args)
            assert time.process_time() - start < SECONDS or code == 0, main.__module__
            assert code == 0 or not target.exists(), main.__module__
            found.append((main.__module__.removeprefix("stackjax."), code, err))
        return found

    return call


def assert_refused(outcomes, message="", by=("inspect", "grow", "convert", "generate")):
    for name, code, err in outcomes:
        if name in by:
            assert (code, err.count("\n")) == (2, 1), (name, code, err)
            assert err.startswith("error: "), err
            assert message in err, err
            assert len(err) < 1000, err


def assert_accepted(outcomes):
    assert [code for _, code, _ in outcomes] == [0] * 4, outcomes


def change_config(path, changes):
    fields = json.loads((path / "config.json").read_text())
    if "rope_theta" in changes:
        fields["rope_parameters"] = None
    (path / "config.json").write_text(json.dumps(fields | changes))


def test_valid_folder_is_accepted(outcomes):
    assert_accepted(outcomes())


@pytest.mark.sample(2)
@pytest.mark.parametrize("field", FIELDS)
def test_config_field_with_wrong_value_is_refused(field, folder, outcomes):
    config = (folder / "config.json").read_text()
    for value in WRONG[FIELDS[field]]:
        (folder / "config.json").write_text(config)
        change_config(folder, {field: value})
        assert_refused(outcomes())


def test_config_with_more_layers_than_tensors_is_refused(folder, outcomes):
    change_config(folder, {"num_hidden_layers": 9000})
    assert_refused(outcomes(), "has no tensor model.layers.3.input_layernorm.weight")
    change_config(folder, {"num_hidden_layers": 2_000_000_000})
    assert_refused(outcomes(), "config.json: model.num_layers is 2000000000")


@pytest.mark.parametrize("name", TEXTS)
def test_config_that_is_not_a_json_object_is_refused(name, folder, outcomes):
    write(folder / "config.json", TEXTS[name])
    assert_refused(outcomes())


def write(file, text):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("name", INDICES)
def test_invalid_index_entry_is_refused(name, folder, outcomes):
    tensors = load_file(folder / ONE_FILE)
    (folder / ONE_FILE).rename(folder.parent / "secret.safetensors")
    os.mkfifo(folder / "pipe")
    (folder / "directory").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to(folder.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, INDICES[name])}
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(outcomes())


@pytest.mark.parametrize("name", INDEX_TEXTS)
def test_index_without_weight_map_is_refused(name, folder, outcomes):
    (folder / ONE_FILE).rename(folder / "model-1.safetensors")
    write(folder / INDEX, INDEX_TEXTS[name])
    assert_refused(outcomes())


def test_index_next_to_a_single_file_is_ignored(folder, outcomes):
    write(folder / INDEX, '{"weight_map": ["../x"]}')
    assert_accepted(outcomes())


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_safetensors_header_is_refused(name, folder, outcomes):
    fields, length, body = HEADERS[name]
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    length = len(text) if length is None else length
    (folder / ONE_FILE).write_bytes(struct.pack("<Q", length) + text + body)
    assert_refused(outcomes())


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_unknown_or_misshapen_tensor_is_refused(name, folder, outcomes):
    WEIGHTS[name](folder)
    assert_refused(outcomes())


@pytest.mark.parametrize("name", NOT_FINITE)
def test_non_finite_weight_is_refused(name, folder, outcomes):
    NOT_FINITE[name](folder)
    assert_refused(outcomes(), "has NaN or infinity", by=("grow", "convert", "generate"))


@pytest.mark.parametrize("name", IRREGULAR)
def test_missing_or_irregular_file_is_refused(name, folder, outcomes):
    IRREGULAR[name](folder)
    assert_refused(outcomes())


def test_code_in_a_folder_is_not_run(folder, outcomes):
    change_config(folder, {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}})
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert_accepted(outcomes())
    assert not (folder / "ran").exists()
