"""Text from a model: what a row continues by depends on nothing but the row."""

import functools
import json
import sys

import jax
import numpy as np
import pytest
from conftest import MESHES, MODELS, mesh_of, random_params, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from judge import greedy

from stackjax import model
from stackjax.data.tokenizer import Tokenizer, load_tokenizer
from stackjax.generate import continuations, generate, main, new_text
from stackjax.pretrained import Pretrained
from stackjax.sampling import Sampling
from stackjax.sharding import partition_of

GREEDY = Sampling(temperature=0)
KEY = jax.random.key(3)
LENGTHS = (3, 1, 7, 4)
NO_END = -1


def tokenizer(end_id) -> Tokenizer:
    """One of which only the end token matters."""
    return Tokenizer(
        name="none", vocab_size=11, end_id=end_id, digest="", encode=np.array, decode=str
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
        tokenizer=tokenizer(end_id),
        prefix_id=5,
        seq_len=16,
    )


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 11, length) for length in lengths]


def continued(name, texts, sampling=GREEDY, max_tokens=6, key=KEY, **fields):
    return continuations(pretrained(name, **fields), texts, sampling, max_tokens, key)


@functools.cache
def expected(name):
    """What transformers continues each prompt by."""
    params = random_params(MODELS[name])
    return [greedy(MODELS[name], params, prompt, 6).tolist() for prompt in prompts()]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, "one device") for name in MODELS),
        *(("gqa", mesh) for mesh in MESHES if mesh != "one device"),
    ],
)
def test_greedy_tokens_are_those_of_transformers_on_every_mesh(name, mesh):
    found = continued(name, prompts(), mesh=mesh)
    assert [row.tolist() for row in found] == expected(name)
