"""Text generation: greedy tokens, sampling, end tokens, streaming and the command."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from conftest import MESHES, MODELS, mesh_of, random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from judge import greedy

from stackjax import model
from stackjax.generate import main
from stackjax.inference.continue_prompts import read_prompts
from stackjax.inference.generation import continuations, generate, new_text
from stackjax.inference.pretrained import Pretrained
from stackjax.options import Sampling
from stackjax.sharding.partition import partition_of
from stackjax.tokenizer.tokenization import Tokenization, tokenization
from stackjax.tokenizer.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
KEY = jax.random.key(3)
LENGTHS = (3, 1, 7, 4)
NO_END = -1

# Characters with 1 to 4 bytes; each distinct byte is a token.
TEXT = "abé→🎄"
ALPHABET = sorted(set(TEXT.encode()))


def tokenizer(end_id) -> Tokenizer:
    """A byte tokenizer with a chosen end token."""

    def encode(text: str) -> np.ndarray:
        return np.array([ALPHABET.index(byte) for byte in text.encode()], np.int64)

    def decode(tokens) -> str:
        return bytes(ALPHABET[token] for token in tokens).decode(errors="replace")

    return Tokenizer(
        name="letters",
        vocab_size=len(ALPHABET),
        end_id=end_id,
        digest="",
        encode=encode,
        encode_special=encode,
        decode=decode,
        find=lambda _: None,
        written=lambda _: "<end>",
    )


@functools.cache
def pretrained(name, mesh="one device", end_id=NO_END) -> Pretrained:
    config = MODELS[name]
    with jax.set_mesh(mesh_of(mesh)):
        abstract = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
        params = jax.tree.map(
            lambda leaf, like: jax.device_put(
                leaf, NamedSharding(mesh_of(mesh), partition_of(like))
            ),
            random_params(config),
            abstract,
        )
    return Pretrained(
        config=config,
        params=params,
        mesh=mesh_of(mesh),
        tokenization=Tokenization(tokenizer(end_id), (end_id,), prefix_id=5),
        seq_len=16,
    )


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 11, length) for length in lengths]


def continued(name, texts, sampling=GREEDY, max_tokens=6, key=KEY, **fields):
    return continuations(pretrained(name, **fields), texts, sampling, max_tokens, key)


@functools.cache
def expected(name):
    """Returns greedy continuations from transformers."""
    params = random_params(MODELS[name])
    return [greedy(MODELS[name], params, prompt, 6).tolist() for prompt in prompts()]


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, "one device") for name in MODELS),
        *(("gqa", mesh) for mesh in MESHES if mesh != "one device"),
    ],
)
def test_greedy_tokens_match_transformers_on_every_mesh(name, mesh):
    found = continued(name, prompts(), mesh=mesh)
    assert [row.tolist() for row in found] == expected(name)


def teacher_forced(config, text_T):
    """Returns the argmax after every token, without a KV cache."""
    text_1T = np.int32(text_T)[None]
    positions_1T = np.arange(len(text_T), dtype=np.int32)[None]
    apply = jax.jit(functools.partial(model.apply, config))
    return np.argmax(apply(random_params(config), text_1T, positions_1T, None)[0], axis=-1)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_match_teacher_forcing(name):
    # The longest prompt is read in three chunks; the others end in the first two.
    texts = prompts((600, 20, 300))
    for prompt, new in zip(texts, continued(name, texts, max_tokens=4), strict=True):
        # Texts padded to a common length share a compiled program.
        text_T = np.concatenate([prompt, new, np.zeros(604 - len(prompt) - len(new), int)])
        argmax_T = teacher_forced(MODELS[name], text_T)
        assert new.tolist() == argmax_T[len(prompt) - 1 :][: len(new)].tolist()


def test_empty_prompt_starts_from_the_prefix():
    empty, prefix = continued("gqa", [np.array([], int), np.array([5])])
    assert empty.tolist() == prefix.tolist()


WARM = Sampling(temperature=1.5, top_k=9, top_p=0.95)


@pytest.mark.sample(4)
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("mesh", ["one device", "fsdp 8"])
def test_rows_are_independent(sampling, mesh):
    texts = prompts()
    together = continued("gqa", texts, sampling, mesh=mesh)
    [alone] = continued("gqa", texts[:1], sampling, mesh=mesh)
    others = continued("gqa", [texts[0], *prompts((40, 2))], sampling, mesh=mesh)
    assert alone.tolist() == together[0].tolist() == others[0].tolist()


@pytest.mark.slow
def test_draws_depend_on_key_and_row_but_not_on_the_mesh():
    found = {mesh: continued("gqa", prompts(), WARM, mesh=mesh) for mesh in MESHES}
    rows = {tuple(map(tuple, each)) for each in found.values()}
    assert len(rows) == 1
    again = continued("gqa", prompts(), WARM)
    assert tuple(map(tuple, again)) in rows
    other = continued("gqa", prompts(), WARM, key=jax.random.key(4))
    assert tuple(map(tuple, other)) not in rows
    # Equal prompts in different rows have different continuations.
    equal_prompts = continued("gqa", [prompts()[0]] * 4, WARM)
    assert len(set(map(tuple, equal_prompts))) > 1


def truncated(end_id, row):
    """Returns a row up to the first end token."""
    return row[: row.index(end_id) + 1] if end_id in row else row


def test_generation_stops_at_end_tokens():
    free = [row.tolist() for row in continued("gqa", prompts())]
    for end_id in sorted({token for row in free for token in row}):
        reference = [truncated(end_id, row) for row in free]
        found = continued("gqa", prompts(), end_id=end_id)
        assert [row.tolist() for row in found] == reference
        steps = list(generate(pretrained("gqa", end_id=end_id), prompts(), GREEDY, 6, KEY))
        assert len(steps) == max(len(row) for row in reference)
        for row, tokens in zip(reference, np.stack(steps, 1).tolist(), strict=True):
            assert tokens == row + [end_id] * (len(steps) - len(row))


@settings(deadline=None)
@given(st.text(TEXT), st.text(TEXT, min_size=1))
def test_text_is_streamed_by_complete_characters(prompt, text):
    bytewise = tokenization(tokenizer(NO_END))
    tokens = bytewise.tokenizer.encode(text).tolist()
    pieces = list(new_text(bytewise, bytewise.encode_prompt(prompt).tolist(), tokens))
    assert [piece for piece in pieces if piece] == list(text)


def test_incomplete_character_is_printed_at_the_end():
    bytewise = tokenization(tokenizer(NO_END))
    tokens = bytewise.tokenizer.encode("aé").tolist()
    assert "".join(new_text(bytewise, [], tokens[:2])) == "a\N{REPLACEMENT CHARACTER}"


@pytest.fixture
def command(monkeypatch, run_main):
    """Runs the command on an in-memory model; returns exit code, stdout and stderr."""
    loaded = pretrained("gqa", end_id=3)
    load = "stackjax.inference.continue_prompts.load_pretrained"
    monkeypatch.setattr(load, lambda path, name: loaded)
    return functools.partial(run_main, main, "MODEL")


def test_single_text_is_printed_with_its_prompt(command):
    code, out, err = command("--prompt", "aé", "--max-tokens", "5", "--seed", "1")
    assert (code, err) == (0, "")
    assert out.startswith("aé") and out.endswith("\n")
    assert command("--prompt", "aé", "--max-tokens", "5", "--seed", "1")[1] == out
    assert command("--prompt", "aé", "--max-tokens", "5", "--seed", "2")[1] != out


def test_json_output_equals_plain_output(command, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("é→\n\n")
    args = ("--prompt", "a", "--prompt-file", str(file), "--max-tokens", "4")
    code, out, err = command(*args)
    assert (code, err) == (0, "")
    _, lines, _ = command(*args, "--json")
    found = [json.loads(line) for line in lines.splitlines()]
    assert [each["prompt"] for each in found] == ["a", "é→", ""]
    texts = [f"--- {i + 1}\n{each['prompt']}{each['text']}\n" for i, each in enumerate(found)]
    assert out == "".join(texts)
    rows = continuations(
        pretrained("gqa", end_id=3),
        [tokenizer(3).encode(text) for text in ("a", "é→", "")],
        Sampling(),
        4,
        jax.random.key(0),
    )
    assert [each["tokens"] for each in found] == [len(row) for row in rows]
    assert [each["ended"] for each in found] == [3 in row for row in rows]


def test_text_longer_than_training_sequences_prints_a_note(command):
    code, out, err = command("--prompt", "a→", "--max-tokens", "13", "--temperature", "0")
    assert (code, err.count("\n")) == (0, 1)
    assert re.search("17 tokens.* 16", err)
    assert out.startswith("a→")
    assert command("--prompt", "a→", "--max-tokens", "12", "--temperature", "0")[2] == ""


def test_invalid_max_tokens_is_refused(command):
    code, _, err = command("--max-tokens", "0")
    assert code == 2
    assert "max_tokens is 0" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--top-k", "0"), "top_k is 0"),
        (("--top-p", "1.5"), "top_p is 1.5"),
        (("--prompt-file", "nowhere.txt"), "No such file or directory: 'nowhere.txt'"),
    ],
)
def test_user_error_is_one_line(command, args, message):
    code, _, err = command(*args)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\rthree", ["one", "two", "three"]),
        (b"one\n\ntwo\r\n\r\n", ["one", "", "two", ""]),
        ("one\u2028two\x0bthree\x85four\n".encode(), ["one\u2028two\x0bthree\x85four"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"\n", [""]),
    ],
)
def test_prompt_file_lines_end_with_any_line_break(data, lines, tmp_path):
    (tmp_path / "prompts").write_bytes(data)
    assert read_prompts(tmp_path / "prompts") == lines


@pytest.mark.parametrize(
    ("data", "rule"), [(b"", "is empty"), (b"a\n\xff\n", "is not UTF-8 text at byte 2")]
)
def test_unreadable_prompt_file_is_refused(data, rule, tmp_path):
    (tmp_path / "prompts").write_bytes(data)
    with pytest.raises(ValueError, match=rule):
        read_prompts(tmp_path / "prompts")


def test_empty_prompt_list_is_refused():
    with pytest.raises(ValueError, match="prompts is empty"):
        generate(pretrained("gqa"), [], GREEDY, 1, KEY)
