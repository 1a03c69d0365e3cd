"""Growth operators defined in a config file, used by value and by text."""

import jax
import numpy as np
import pytest
from conftest import random_params, tiny_model

from stackjax import model
from stackjax.config import Config
from stackjax.config_file import load_config
from stackjax.growth import base, parse_growth
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand

CONFIG = '''
from __future__ import annotations

import dataclasses

from depths import DEPTH
from stackjax.config import (
    CheckpointConfig, Config, DataConfig, EvaluationConfig, LoggingConfig, Stage
)
from stackjax.growth.depth import LayerGather
from stackjax.model import ModelConfig
from stackjax.optimizers import AdamW


@dataclasses.dataclass(frozen=True)
class {name}(LayerGather):
    """Stacks mirrored copies: 0 1 2 becomes 0 1 2 2 1 0."""

    copies: int = 1

    def sources(self, depth: int) -> tuple[int, ...]:
        return (*range(depth), *(tuple(reversed(range(depth))) * self.copies))

    def source_depth(self, depth: int) -> int:
        return depth // (1 + self.copies)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=11, num_layers=DEPTH, embed_dim=16, mlp_dim=20, num_heads=2,
            num_kv_heads=2, head_dim=6,
        ),
        data=DataConfig(path="data", seq_len=8),
        optimizer=AdamW(peak_learning_rate=1e-2),
        stages=(
            Stage(tokens=64, batch_size=8),
            Stage(tokens=64, batch_size=8, growth={name}()),
        ),
        evaluation=EvaluationConfig(every_tokens=64, num_sequences=8, batch_size=8),
        checkpoints=CheckpointConfig(every_tokens=64),
        logging=LoggingConfig(every_tokens=64),
        workdir="runs/own",
    )
'''


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Forgets the operators of a test afterwards."""
    monkeypatch.setattr(base, "_REGISTERED", dict(base._REGISTERED))


def load(directory, depth=6, name="Mirror", *overrides: str) -> Config:
    """Returns a config whose file imports `depths` from its own directory."""
    directory.mkdir(exist_ok=True)
    (directory / "depths.py").write_text(f"DEPTH = {depth}\n")
    (directory / "own.py").write_text(CONFIG.format(name=name))
    return load_config("test", ["--config", str(directory / "own.py"), *overrides])


def depths(config: Config) -> list[int]:
    return [phase.model.num_layers for phase in expand(config)]


def test_own_operator_grows_a_run_by_value_and_by_text(tmp_path):
    assert depths(load(tmp_path)) == [3, 6]
    assert depths(load(tmp_path, 6, "Mirror", "--stages.1.growth", "mirror(copies=2)")) == [
        2,
        6,
    ]
    chained = load(tmp_path / "deep", 12, "Mirror", "--stages.1.growth", "stack(2)+mirror()")
    assert depths(chained) == [3, 12]


def test_own_operator_gathers_layers_and_reads_its_own_text(tmp_path):
    growth, source = load(tmp_path).stages[1].growth, tiny_model()
    assert growth is not None and parse_growth(str(growth)) == growth
    params, axes = random_params(source), model.logical_axes(source)
    grown = growth.grow_params(params, axes, source, key=jax.random.key(0), fresh=None)
    for name, leaf in params["layers"].items():
        np.testing.assert_array_equal(grown["layers"][name], leaf[[0, 1, 2, 2, 1, 0]])


def test_name_of_a_builtin_operator_is_refused(tmp_path):
    with pytest.raises(UserError, match="stack"):
        load(tmp_path, 6, "Stack")


def test_each_config_directory_has_its_own_helper_modules(tmp_path):
    assert depths(load(tmp_path / "a", 6)) == [3, 6]
    assert depths(load(tmp_path / "b", 8)) == [4, 8]
    assert depths(load(tmp_path / "a", 10)) == [5, 10]
