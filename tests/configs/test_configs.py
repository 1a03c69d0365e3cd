"""Experiment configs: memory on a mesh, model sizes, stages and cost."""

from dataclasses import replace
from pathlib import Path

import pytest

from scripts.bakeoff import load_runs
from stackjax.config_file import load_config, read_config
from stackjax.growth import Stack
from stackjax.model.flops import flops_6nd, num_params
from stackjax.optimizers import Muon
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.partition import partition_of
from stackjax.training.expand import expand
from stackjax.training.preflight import check

CONFIGS = [*sorted(Path("configs").glob("*.py")), *sorted(Path("configs").glob("recipes/*.py"))]
PAPER = {
    # Parameters in billions, with and without embedding and head; target tokens; source and
    # target layers; peak learning rates. From arXiv:2405.15319, table 1, and the paper's code.
    "410m": (0.374, 0.308, 750e9, (6, 24), (1e-3, 6e-4)),
    "1b": (1.364, 1.233, 97.5e9, (6, 24), (1e-3, 3e-4)),
    "3b": (2.397, 2.234, 300e9, (8, 32), (5e-4, 1.6e-4)),
    "7b": (5.933, 5.671, 300e9, (8, 32), (3e-4, 1e-4)),
}


def load(name: str, *overrides: str):
    (path,) = (path for path in CONFIGS if path.stem == name)
    if not overrides:
        return read_config(path)
    return load_config("test", ["--config", str(path), *overrides])


@pytest.mark.sample(3)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_fits_a_mesh_of_8_by_4(path):
    is_divisible = load(path.stem).model.num_kv_heads % 4 == 0
    tensor = 4 if is_divisible and "tiny" not in path.stem else 1
    config = load(path.stem, "--mesh.fsdp", "8", "--mesh.tensor", str(tensor))
    devices = 8 * tensor
    # Muon has one moment for matrices in layers, AdamW two.
    floats = 2 if isinstance(config.optimizer, Muon) else 3
    for estimate in check(config, devices):
        params = estimate.state.params
        assert estimate.state_bytes < 80 * 2**30
        # Matrices are sharded over all mesh axes.
        query = partition_of(params["layers"]["query"])
        assert tuple(query) == (None, ("fsdp", "context"), "tensor", None)
        # Float32 parameters and moments are sharded; gains and counts are replicated.
        per_copy = 4 * num_params(estimate.phase.model) / devices
        assert floats * per_copy <= estimate.state_bytes < 3.03 * per_copy + 12 * 2**20


def test_paper_sizes_need_an_accelerator():
    configs = {path.stem: [load(path.stem)] for path in CONFIGS}
    for name in ("bakeoff", "noise", "table5", "gradual"):
        for size in ("tiny", "1b"):
            runs = load_runs(Path(f"configs/{name}_{size}.py"))(seed=0)
            configs[f"{name}_{size}"] += runs.values()
    for name, found in configs.items():
        expected = "any" if "tiny" in name else "accelerator"
        assert {config.platform for config in found} == {expected}, name


@pytest.mark.parametrize("name", PAPER)
def test_paper_models_have_the_paper_sizes(name):
    total, non_embedding, tokens, layers, peaks = PAPER[name]
    base, target = expand(load(f"gstack_{name}"))
    billions = num_params(target.model) / 1e9
    tables = 2 * target.model.vocab_size * target.model.embed_dim / 1e9
    assert round(billions, 3) == total
    assert round(billions - tables, 3) == non_embedding
    assert (base.model.num_layers, target.model.num_layers) == layers
    assert target.growth == Stack(factor=4)
    assert target.optimizer_state == "reset"
    step_tokens = 1024 * 2048
    assert base.per_step.tokens == target.per_step.tokens == step_tokens
    assert 0 <= base.end.tokens - 10e9 < step_tokens
    assert 0 <= target.end.tokens - base.end.tokens - tokens < step_tokens
    for phase, peak in zip((base, target), peaks, strict=True):
        rate = phase.learning_rate
        assert float(rate(2_999)) == pytest.approx(peak)  # after 3000 warm-up steps
        assert float(rate(0)) == pytest.approx(peak / 3000)
        assert float(rate(10**6)) == pytest.approx(peak / 10)


@pytest.mark.parametrize("name", PAPER)
def test_scratch_config_has_equal_cost(name):
    grown, scratch = expand(load(f"gstack_{name}")), expand(load(f"scratch_{name}"))
    assert len(scratch) == 1
    assert scratch[0].model == grown[-1].model
    surplus = scratch[0].end.flops_6nd - grown[-1].end.flops_6nd
    assert 0 <= surplus < scratch[0].per_step.flops_6nd


def test_overrides_keep_the_target_model_and_the_other_optimizer_fields():
    config = load("gstack_1b", "--stages.1.growth.factor", "2")
    assert [phase.model.num_layers for phase in expand(config)] == [12, 24]
    optimizer = load("gstack_1b", "--optimizer.peak-learning-rate", "2e-4").optimizer
    assert optimizer == replace(load("gstack_1b").optimizer, peak_learning_rate=2e-4)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("bakeoff_tiny", 1e6),
        ("bakeoff_1b", 8e20),
        ("noise_tiny", 1e6),
        ("noise_1b", 8e20),
        ("table5_tiny", 4e5),
        ("table5_1b", 8e20),
    ],
)
def test_compared_runs_have_equal_target_and_cost(name, flops):
    runs = load_runs(Path(f"configs/{name}.py"))(seed=3)
    target = load(name).model
    if flops < 1e9:
        flops *= flops_6nd(target)  # tokens from scratch
    assert len({config.workdir for config in runs.values()}) == len(runs)
    for config in runs.values():
        phases = expand(config)
        assert config.seed == 3
        assert phases[-1].model == target
        # The cost is rounded up to a whole step.
        assert 0 <= flops - phases[-1].end.flops_6nd < phases[-1].per_step.flops_6nd
    growths = {str(config.stages[1].growth) for config in runs.values() if config.stages[1:]}
    timings = {config.stages[0].tokens for config in runs.values() if config.stages[1:]}
    assert len(runs) == len(growths) * len(timings) + 1


def test_bakeoff_has_every_operator_at_d_and_5d():
    for name in ("bakeoff_tiny", "bakeoff_1b"):
        runs = load_runs(Path(f"configs/{name}.py"))(seed=0)
        kinds = {label.rpartition(", ")[0] for label in runs if label != "scratch"}
        ways = ("direct", "zero", "random", "learned")
        assert kinds == {f"{way}, {axis}" for way in ways for axis in ("depth", "width")}
        tokens = [run.stages[0].tokens for label, run in runs.items() if label != "scratch"]
        assert max(tokens) == 5 * min(tokens)


def test_multi_stage_configs_have_the_published_sizes():
    sizes = [(p.model.num_layers, p.model.embed_dim) for p in expand(load("flm_1b"))]
    assert sizes == [(6, 512), (12, 1024), (24, 2048)]
    layers = [phase.trained_layers for phase in expand(load("mslt_1b"))]
    assert [None if row is None else sum(row) for row in layers] == [None, 6, 12, None]
    assert [p.model.num_layers for p in expand(load("gradual_1b"))] == [6, 12, 24]


def test_paper_config_has_the_default_mesh():
    assert load("gstack_1b").mesh == MeshConfig()
