"""Loading models and tokenizers from runs, checkpoints and folders."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys

import folders
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from stackjax import generate
from stackjax.data.manifest import read_manifest, write_manifest
from stackjax.growth import Stack
from stackjax.inference.convert import convert
from stackjax.inference.generation import continuations
from stackjax.inference.pretrained import load_pretrained
from stackjax.inference.run_tokenizer import data_tokenizer
from stackjax.interop.folder import write_tokenizer
from stackjax.options import ConvertConfig, GrowConfig, Sampling
from stackjax.run.grow import grow
from stackjax.tokenizer.special_tokens import read_tokenization
from stackjax.tokenizer.tokenizer import load_tokenizer

TEXT = "a model that grows while it trains"


def write_tokenizer_json(path, special=("<|begin|>", "</s>"), begins=False):
    """Writes a small BPE tokenizer with special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=list(special),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TEXT] * 4, trainer)
    if begins:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    model.save(str(path / "tokenizer.json"))


SETTINGS = {
    "tokens": ({"bos_token": "<|begin|>", "eos_token": "</s>"}, {}, (0, 1)),
    "token objects": (
        {
            "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "lstrip": False},
            "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
        },
        {},
        (0, 1),
    ),
    "no bos_token": ({"bos_token": None, "eos_token": "</s>"}, {}, (1, 1)),
    "end id": ({}, {"eos_token_id": 1}, (1, 1)),
    "several end ids": ({}, {"eos_token_id": [1, 0]}, (1, 1)),
    "nothing": ({}, {}, (1, 1)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_folder_tokenizer_matches_transformers(name, tmp_path):
    settings, generation, (prefix, end) = SETTINGS[name]
    write_tokenizer_json(tmp_path)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = read_tokenization(tmp_path)
    tokenizer = found.tokenizer
    assert (found.prefix_id, tokenizer.end_id) == (prefix, end)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(TEXT).tolist() == theirs(TEXT, add_special_tokens=False).input_ids
    assert found.begin_ids == ()


@pytest.mark.parametrize("begins", [False, True])
def test_prompt_starts_with_the_folder_begin_tokens(begins, tmp_path, run_main):
    folder = folders.write(tmp_path / "folder", "llama", vocab_size=270)
    write_tokenizer_json(folder, begins=begins)
    settings = SETTINGS["tokens"][0] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_pretrained(str(folder)).tokenization.begin_ids == (0,) * begins
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = theirs(TEXT, return_tensors="pt")
    with torch.inference_mode():
        out = network.generate(**ids, do_sample=False, max_new_tokens=9, pad_token_id=1)
    expected = theirs.decode(out[0], skip_special_tokens=True)
    args = ("--prompt", TEXT, "--temperature", "0", "--max-tokens", "9", "--json")
    found = json.loads(run_main(generate.main, folder, *args)[1])
    assert found["prompt"] + found["text"] == expected


def test_folder_without_tokenizer_is_refused(tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    with pytest.raises(ValueError, match=r"has no tokenizer .*--tokenizer"):
        load_pretrained(str(folder))


def test_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    folder = folders.write(tmp_path / "folder", "llama")
    with pytest.raises(ValueError, match=r"bytes has 256 tokens.* 61"):
        load_pretrained(str(folder), "bytes")


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    write_tokenizer(load_tokenizer("bytes"), path)
    return transformers.AutoTokenizer.from_pretrained(path)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_exported_bytes_tokenizer_matches_transformers(bytes_tokenizer, text):
    ids = bytes_tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert bytes_tokenizer.decode(ids) == text
    assert bytes_tokenizer.eos_token_id == 0


def test_tokenizer_json_is_exported_unchanged(tmp_path):
    write_tokenizer_json(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT).tolist()
    assert theirs.eos_token_id == tokenizer.end_id
    assert read_tokenization(tmp_path / "out").tokenizer.digest == tokenizer.digest


@pytest.mark.parametrize("add_dummy_prefix", [False, True])
def test_exported_sentencepiece_model_matches_transformers(add_dummy_prefix, tmp_path):
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=data,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        minloglevel=2,
    )
    (tmp_path / "a.model").write_bytes(data.getvalue())
    tokenizer = load_tokenizer(str(tmp_path / "a.model"))
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    # transformers drops the dummy prefix of texts with a leading space.
    for text in (TEXT, "two  spaces", "a line\nand déjà vu"):
        assert theirs(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.eos_token_id == tokenizer.end_id
    found = read_tokenization(tmp_path / "out")
    assert (found.tokenizer.digest, found.begin_ids) == (tokenizer.digest, ())


def test_run_exported_folder_and_transformers_generate_the_same_text(uncut, tmp_path):
    convert(ConvertConfig(source=str(uncut), target=str(tmp_path / "folder"), verify=True))
    found, greedy = [], Sampling(temperature=0)
    for path in (uncut, tmp_path / "folder"):
        pretrained = load_pretrained(str(path))
        assert (pretrained.seq_len, pretrained.tokenization.prefix_id) == (16, 0)
        prompt = pretrained.tokenizer.encode("a mod")
        (tokens,) = continuations(pretrained, [prompt], greedy, 11, jax.random.key(0))
        found.append(tokens.tolist())
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    ids = theirs("a mod", return_tensors="pt")
    with torch.inference_mode():
        out = network.generate(**ids, do_sample=False, max_new_tokens=11, pad_token_id=0)
    expected = out[0, ids.input_ids.shape[1] :].tolist()
    assert found == [expected, expected]


def test_grown_checkpoint_keeps_the_run_tokenizer(uncut, tmp_path):
    grow(GrowConfig(source=str(uncut), target=str(tmp_path / "grown"), growth=Stack(2)))
    pretrained = load_pretrained(str(tmp_path / "grown"))
    assert (pretrained.tokenizer.name, pretrained.seq_len) == ("bytes", 16)
    assert pretrained.config.num_layers == 4


def test_checkpoint_outside_a_run_is_refused(uncut, tmp_path):
    shutil.copytree(uncut / "stage_1" / "train" / "8", tmp_path / "alone" / "8")
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_pretrained(str(tmp_path / "alone"))
    with pytest.raises(ValueError, match="sequence length are unknown"):
        load_pretrained(str(tmp_path / "alone"), "bytes")


def test_commands_import_without_optional_packages():
    code = """
import sys


class Absent:
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("torch", "transformers", "lm_eval", "accelerate", "datasets"):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())
import stackjax.train, stackjax.grow, stackjax.convert, stackjax.generate, stackjax.evaluate
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def shards_with_tokenizer(world, tmp_path):
    """Returns token shards with a tokenizer file in the manifest, and the file."""
    write_tokenizer_json(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = load_tokenizer(str(file))
    data = shutil.copytree(world.path / "data", tmp_path / "data")
    manifest = read_manifest(str(data))
    info = dataclasses.replace(
        manifest.tokenizer,
        name=str(file),
        digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        file="tokenizer.json",
    )
    assert info.end_id == 0
    write_manifest(str(data), dataclasses.replace(manifest, tokenizer=info))
    return data, file.rename(data / "tokenizer.json")


def test_data_tokenizer_is_read_from_the_shards(world, tmp_path):
    data, file = shards_with_tokenizer(world, tmp_path)
    # The manifest has the end token.
    assert data_tokenizer(str(data)).end_id == 0
    write_tokenizer_json(data, special=("</s>",))
    with pytest.raises(ValueError, match=r"is not the tokenizer recorded in .*manifest.json"):
        data_tokenizer(str(data))
    file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json' is not a file"):
        data_tokenizer(str(data))


@pytest.mark.slow
def test_only_tokens_of_the_tokenizer_are_drawn(tmp_path):
    folder = folders.write(tmp_path / "folder", "qwen3, tied, other base", vocab_size=300)
    found = load_pretrained(str(folder), "bytes")
    assert found.config.padded_vocab_size == 384
    endless = dataclasses.replace(found, tokenization=found.tokenization._replace(end_ids=()))
    args = endless, [np.array([1])], Sampling(temperature=1e6), 400, jax.random.key(0)
    (tokens,) = continuations(*args)
    assert len(tokens) == 400 and 250 < max(tokens) < 256
    (tokens,) = continuations(*args, vocab_size=300)
    assert 290 < max(tokens) < 300
    # Ids beyond the tokenizer decode to no text.
    assert found.tokenizer.decode([65, 299, 66]) == "AB"
