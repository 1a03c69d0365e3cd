"""A run on three sources, in two stages with other weights and other lengths."""

import dataclasses

import jax
import numpy as np
import pytest
from runs import last_state, rarely_saved, rows

from stackjax.analysis.comparison import Group
from stackjax.analysis.reading import read_record
from stackjax.analysis.tables import sources_table
from stackjax.analysis.tuning import Tuned
from stackjax.config import DataConfig, SourceConfig
from stackjax.config_file import read_config
from stackjax.data.config import PrepareConfig
from stackjax.data.loader import train_batches
from stackjax.data.overlap import check_held_out
from stackjax.data.prepare import prepare
from stackjax.growth import DepthZero
from stackjax.inference.saved_model import open_model
from stackjax.run.hooks import Hook
from stackjax.run.train import train
from stackjax.run.validation import open_data
from stackjax.runtime.errors import UserError
from stackjax.training.batches import data_order
from stackjax.training.expand import expand

NAMES = ("web", "code", "prose")


@pytest.fixture(scope="module")
def config(world, mixture):
    # In the config file's own directory.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.path)
        patch.syspath_prepend(str(world.path))
        return rarely_saved(read_config(mixture))


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The directory of the uncut run."""
    path = tmp_path_factory.mktemp("mixture") / "run"
    train(dataclasses.replace(config, workdir=str(path)))
    return path


def evaluations(workdir):
    return [row for row in rows(workdir) if row["kind"] == "evaluation"]


def test_loss_is_the_weighted_mean_of_the_sources_losses(config, trained):
    weights = [source.weight for source in config.data.sources]
    for row in [*evaluations(trained), *(r for r in rows(trained) if r["kind"] == "growth")]:
        of_sources = [row[f"held_out_loss/{name}"] for name in NAMES]
        expected = np.average(of_sources, weights=weights)
        np.testing.assert_allclose(row["held_out_loss"], expected, rtol=1e-12)
        assert len(set(of_sources)) == 3


def test_rows_count_the_epochs_of_each_source(config, trained):
    sources, _ = open_data(config)
    order = data_order(sources, config.seed, expand(config))
    assert order.chunk_len == 32
    last = evaluations(trained)[-1]
    read = [
        last[f"epochs/{name}"] * len(s) * 32 for name, s in zip(NAMES, sources, strict=True)
    ]
    np.testing.assert_allclose(sum(read), last["tokens"])
    # 1024 tokens each in a stage; the first has weights 2, 1, 1, the second 1, 3, 0.
    np.testing.assert_allclose(read, [512 + 256, 256 + 768, 256], atol=8 * 32)


def test_longer_sequences_are_evaluated_beyond_the_old_length(trained):
    is_beyond = ["held_out_loss_beyond" in row for row in evaluations(trained)]
    assert is_beyond == [row["stage"] == 1 for row in evaluations(trained)]
    assert is_beyond.count(True) >= 1
    [seam] = [row for row in rows(trained) if row["kind"] == "growth"]
    assert seam["held_out_loss_beyond"] != seam["held_out_loss"]


def test_growth_compares_losses_on_sequences_of_the_same_length(config, tmp_path):
    same = dataclasses.replace(config.stages[1], growth=None, rope_theta=None)
    stages = (config.stages[0], same)
    train(dataclasses.replace(config, stages=stages, workdir=str(tmp_path)))
    [seam] = [row for row in rows(tmp_path) if row["kind"] == "growth"]
    assert seam["held_out_loss"] == seam["held_out_loss_before"]


def test_growth_that_preserves_the_function_may_come_with_other_positions(config, tmp_path):
    grown = with_stage(config, growth=DepthZero(factor=2))
    train(dataclasses.replace(grown, workdir=str(tmp_path)))
    [seam] = [row for row in rows(tmp_path) if row["kind"] == "growth"]
    assert seam["held_out_loss"] != seam["held_out_loss_before"]


def test_record_has_the_losses_by_source_and_the_last_stages_length(trained):
    record = read_record(trained)
    last = evaluations(trained)[-1]
    assert record.final_sources == {
        name: (last[f"held_out_loss/{name}"], last[f"epochs/{name}"]) for name in NAMES
    }
    assert (record.seq_len, record.final_model.rope_theta) == (32, 5e4)
    places = ((trained, 32), (trained / "stage_0" / "train" / "8", 16))
    assert [open_model(str(path)).seq_len for path, _ in places] == [32, 16]
    assert len(record.data_paths) == 3
    table = sources_table([Group(label="grown", tuned=Tuned(((record,),)))])
    assert table is not None
    assert [row[2] for row in table.rows] == list(NAMES)


def test_cut_run_resumes_bit_for_bit(config, trained, tmp_path):
    def stop(info):
        if info.counts.tokens == 1536:
            raise KeyboardInterrupt
        return False

    every = dataclasses.replace(config.checkpoints, every_tokens=256)
    cut = dataclasses.replace(config, checkpoints=every, workdir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        train(cut, hooks=[Hook(kind="stop", when=stop, on_step=dict)])
    train(cut)
    assert rows(tmp_path) == rows(trained)
    found, expected = (last_state(path, 1, step=4) for path in (tmp_path, trained))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_held_out_documents_never_appear_in_training(config):
    sources, validation = open_data(config)
    streams = [stream(source) for source in sources]
    documents = [text for source in validation for text in stream(source).split(b"\0") if text]
    assert len(documents) >= 20
    # The first and the last document may be cut.
    assert not any(document in text for document in documents for text in streams)
    order = data_order(sources, config.seed, expand(config))
    batches = train_batches(
        sources,
        config.data,
        order,
        first_example=0,
        batch_size=64,
        accumulate=1,
        rows=slice(None),
        num_batches=20,
    )
    for batch in batches:
        for tokens in batch.tokens.reshape(-1, batch.tokens.shape[-1]).astype(np.uint8):
            assert any(tokens.tobytes() in text for text in streams)


def stream(source) -> bytes:
    """Returns all tokens of a source, which are bytes."""
    num_tokens = source.manifest.splits[source.split].tokens
    return source.read(0, num_tokens).astype(np.uint8).tobytes()


def test_documents_held_out_by_one_source_and_read_in_another_are_refused(world, tmp_path):
    text, config = world.path / "web.jsonl", world.config(workdir=tmp_path / "run")
    sources = []
    for name, fraction in (("few", 0.1), ("many", 0.4), ("as many", 0.4)):
        path = str(tmp_path / name)
        prepare(
            PrepareConfig(
                paths=(str(text), path), tokenizer="bytes", validation_fraction=fraction
            )
        )
        sources.append(SourceConfig(name=name.replace(" ", "_"), path=path))
    check_held_out(sources[1:])
    data = DataConfig(sources=tuple(sources[:2]), seq_len=16)
    with pytest.raises(UserError, match=r"\d+ documents are held out by the source 'many'"):
        train(dataclasses.replace(config, data=data))
    assert not (tmp_path / "run" / "config.json").exists()


REFUSED = {
    "max_epochs": (
        lambda c: with_source(c, 2, max_epochs=0.01),
        r"source 'prose', [\d.]+ epochs of its [\d,]+, and max_epochs is 0.01; [\d,]+ tokens",
    ),
    "name": (
        lambda c: with_source(c, 1, name="web"),
        r"1.name is 'web', as of another",
    ),
    "before": (
        lambda c: with_source(c, 1, name="web_before"),
        r"1.name is 'web_before', which is the name of another source's loss before growth",
    ),
    "same data": (
        lambda c: with_source(c, 1, path=c.data.sources[0].path),
        r"sources 'web' and 'code' are the same data set",
    ),
    "slash": (lambda c: with_source(c, 1, name="a/b"), r"sources.1.name is 'a/b'; it may have"),
    "weights": (lambda c: with_stage(c, source_weights=(1.0,)), r"has 1 weights, .* 3 sources"),
    "zero": (
        lambda c: with_stage(c, source_weights=(0.0, 0.0, 0.0)),
        r"stages.1.source_weights is .*at least one must be more than 0",
    ),
    "path": (
        lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, path="data")),
        r"give either a path or sources",
    ),
    "packing": (
        lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, packing="best_fit")),
        r"packed sequences need one length",
    ),
}


def with_source(config, index, **fields):
    sources = list(config.data.sources)
    sources[index] = dataclasses.replace(sources[index], **fields)
    data = dataclasses.replace(config.data, sources=tuple(sources))
    return dataclasses.replace(config, data=data)


def with_stage(config, **fields):
    second = dataclasses.replace(config.stages[1], **fields)
    return dataclasses.replace(config, stages=(config.stages[0], second))


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_mixture_is_refused_before_training(config, tmp_path, name):
    change, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        train(change(dataclasses.replace(config, workdir=str(tmp_path / "run"))))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


CHANGED = {
    "weight": lambda c: with_source(c, 0, weight=9.0),
    "longest": lambda c: with_stage(c, seq_len=64),
    "past weights": lambda c: dataclasses.replace(
        c,
        stages=(dataclasses.replace(c.stages[0], source_weights=(1.0, 1.0, 1.0)), c.stages[1]),
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_change_of_the_order_is_refused_at_a_resume(config, trained, name):
    with pytest.raises(UserError, match=r"may not change at a resume: .*order of"):
        train(CHANGED[name](dataclasses.replace(config, workdir=str(trained))))


@pytest.mark.parametrize("mask_documents", [False, True])
def test_packed_sources_train(config, tmp_path, mask_documents):
    data = dataclasses.replace(
        config.data, packing="best_fit", mask_documents=mask_documents, seq_len=256
    )
    first, second = (
        dataclasses.replace(stage, seq_len=None, tokens=4096, batch_size=8)
        for stage in config.stages
    )
    evaluation = dataclasses.replace(config.evaluation, num_sequences=4)
    run = dataclasses.replace(
        config,
        data=data,
        stages=(first, second),
        evaluation=evaluation,
        workdir=str(tmp_path),
    )
    train(run)
    losses = [row["loss"] for row in rows(tmp_path) if row["kind"] == "train"]
    assert losses[-1] < losses[0]
