"""Harness responses match the hf model for all begin and end tokens."""

import json

import folders
import numpy as np
import pytest
import tokenizer_kinds
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizer_kinds import BOS, EOS, sentencepiece_model
from tokenizers import processors

from stackjax.inference.lm_eval_adapter import StackjaxLM
from stackjax.inference.pretrained import load_pretrained

SEQ_LEN = 40
VOCAB_SIZE = 330
"""More than any tokenizer has, and equal for all, so that their models share programs."""
TOKENIZERS = {
    "BOS template": (BOS, "", {"bos_token": BOS}),
    "BOS and EOS template": (BOS, EOS, {"bos_token": BOS}),
    "BOS without template": ("", "", {"bos_token": BOS}),
    "no BOS": ("", "", {}),
    "add_bos flag": ("", "", {"bos_token": BOS, "add_bos_token": True}),
    "sentencepiece": None,
    "sentencepiece, add_bos flag": None,
}


def write_tokenizer(path, name) -> None:
    """Writes a tokenizer."""
    if TOKENIZERS[name] is None:
        data = sentencepiece_model(model_type="bpe")
        (path / "tokenizer.model").write_bytes(data)
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": "flag" in name}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        return
    begin, end, settings = TOKENIZERS[name]
    model = tokenizer_kinds.bpe_with_merges()
    if begin or end:
        model.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}".strip(),
            pair=f"{begin} $A {end} {begin} $B {end}".strip().replace("  ", " "),
            special_tokens=[(token, model.token_to_id(token)) for token in (BOS, EOS)],
        )
    model.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=TOKENIZERS)
def both(request, tmp_path_factory):
    """Our model and the hf model for the same folder."""
    path = tmp_path_factory.mktemp("folder") / "folder"
    path.mkdir()
    write_tokenizer(path, request.param)
    folders.write(path, "llama", vocab_size=VOCAB_SIZE, max_position_embeddings=SEQ_LEN)
    generation = {"eos_token_id": [2, 70], "bos_token_id": 1}
    (path / "generation_config.json").write_text(json.dumps(generation))
    network = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    theirs = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=1, device="cpu")
    assert theirs.max_length == SEQ_LEN
    return StackjaxLM(load_pretrained(str(path)), batch_size=4), theirs


def responses(models, kind, *arguments):
    """Returns both models' responses."""
    requests = [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]
    return [getattr(lm, kind)(requests, disable_tqdm=True) for lm in models]


LONG = "Grown models train faster, and this text is longer than they read. "


@pytest.mark.sample(3)
def test_log_likelihoods_match_hf(both):
    ours, theirs = responses(
        both,
        "loglikelihood",
        ("The sky is", " blue"),
        ("A cat says ", "meow"),
        ("", "Water"),
        ("", f"{BOS}Water"),
        ("", f"{EOS}Water"),
        (f"{BOS}The sky", " is"),
        (f"one{EOS}two", " three"),
        (LONG, "ends"),
        ("x ", "y"),
    )
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], rtol=2e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_log_likelihoods_match_hf(both):
    texts = ("The sky is blue", LONG, "a", f"{BOS}a", f"a{EOS}b", "é" * 30)
    ours, theirs = responses(both, "loglikelihood_rolling", *((text,) for text in texts))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


@pytest.mark.sample(11)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"until": ["."], "max_gen_toks": 12},
        {"until": ["a", "e"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7},
        {"until": "", "max_new_tokens": 9},
        {"max_gen_toks": 30, "num_beams": 1, "top_p": 0.9, "top_k": 5},
    ],
    ids=str,
)
def test_generated_texts_match_hf(both, kwargs):
    prompts = ("The sky is", "abc", LONG, f"{BOS}abc", f"one{EOS}two", "x y z")
    ours, theirs = responses(both, "generate_until", *((prompt, kwargs) for prompt in prompts))
    assert ours == theirs
    assert any(theirs)


@pytest.mark.parametrize("context", ["", "A context", "x "[:1]])
def test_empty_text_is_refused_by_both(both, context):
    ours, theirs = both
    request = [Instance("loglikelihood", {}, (context, ""), 0)]
    with pytest.raises(ValueError, match="likelihood of an empty text after"):
        ours.loglikelihood(request)
    with pytest.raises((AssertionError, IndexError)):
        theirs.loglikelihood(request)
