"""A stage with several batch sizes trains like a stage for each of them."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from runs import last_state, rarely_saved, rows

from stackjax.config import BatchStep, ProbeConfig, Stage
from stackjax.growth import DepthRandom, DepthZero
from stackjax.run.growth_probe import check_probes
from stackjax.run.hooks import Hook
from stackjax.run.train import train
from stackjax.runtime.errors import UserError


def run_config(world, workdir, *stages):
    """The tiny run with other stages, and a constant learning rate."""
    config = rarely_saved(world.config("--optimizer.schedule.shape", "constant"))
    return dataclasses.replace(config, stages=stages, workdir=str(workdir))


FIRST = Stage(tokens=256, batch_size=8)
STEP = BatchStep(from_tokens=512, batch_size=16, accumulate=2)


def train_rows(workdir):
    return [
        (row["tokens"], row["examples"], row["flops"], row["loss"])
        for row in rows(workdir)
        if row["kind"] == "train"
    ]


def test_batch_steps_equal_stages_without_growth_bit_for_bit(world, tmp_path):
    stepped, apart = tmp_path / "stepped", tmp_path / "apart"
    whole = Stage(tokens=1024, batch_size=8, batch_steps=(STEP,))
    train(run_config(world, stepped, FIRST, whole))
    small = Stage(tokens=512, batch_size=8)
    large = Stage(tokens=512, batch_size=16, accumulate=2)
    train(run_config(world, apart, FIRST, small, large))
    assert train_rows(stepped) == train_rows(apart)
    found, expected = last_state(stepped, 1, 2, "train_1"), last_state(apart, 2, 2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # A new batch is no growth, and the stage goes on.
    assert [row["kind"] for row in rows(stepped)].count("growth") == 1


@pytest.mark.parametrize("tokens", [640, 1024])
def test_run_resumes_in_any_part_while_masks_open(world, tmp_path, tokens):
    growth = DepthRandom(factor=2, mask_tokens=900)
    grown = Stage(tokens=1024, batch_size=8, batch_steps=(STEP,), growth=growth)
    uncut, cut = (run_config(world, tmp_path / name, FIRST, grown) for name in ("uncut", "cut"))
    train(uncut)

    def stop(info):
        if info.counts.tokens == tokens:
            raise KeyboardInterrupt
        return False

    cut = dataclasses.replace(
        cut, checkpoints=dataclasses.replace(cut.checkpoints, every_tokens=256)
    )
    with pytest.raises(KeyboardInterrupt):
        train(cut, hooks=[Hook(kind="stop", when=stop, on_step=dict)])
    train(cut)
    assert train_rows(tmp_path / "cut") == train_rows(tmp_path / "uncut")
    found, expected = (last_state(tmp_path / n, 1, 2, "train_1") for n in ("cut", "uncut"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_stage_ends_early_in_its_first_part(world, tmp_path):
    whole = Stage(tokens=1024, batch_size=8, batch_steps=(STEP,))
    until = dataclasses.replace(whole.until, tokens=512)
    early = dataclasses.replace(whole, until=until)
    train(run_config(world, tmp_path, FIRST, early, FIRST))
    ends = [row["tokens"] for row in rows(tmp_path) if row["kind"] == "trigger"]
    assert ends == [512]
    assert not (tmp_path / "stage_1" / "train_1").exists()
    assert rows(tmp_path)[-1]["tokens"] == 512 + 256


def test_probe_in_any_part_equals_a_probe_without_later_parts(world, tmp_path):
    grown = Stage(tokens=256, batch_size=8, growth=DepthZero(factor=2))
    probes = ProbeConfig(at_tokens=(512,), lag_tokens=256)
    found = []
    for name, steps in (("plain", ()), ("stepped", (STEP,))):
        first = Stage(tokens=1024, batch_size=8, batch_steps=steps)
        config = run_config(world, tmp_path / name, first, grown)
        train(dataclasses.replace(config, probes=probes))
        found += [row for row in rows(tmp_path / name) if row["kind"] == "probe"]
    assert len(found) == 2
    assert found[0] == found[1]


def test_probe_at_the_end_of_the_stage_is_refused(world, tmp_path):
    first = Stage(tokens=1024, batch_size=8, batch_steps=(STEP,))
    grown = Stage(tokens=256, batch_size=8, growth=DepthZero(factor=2))
    config = run_config(world, tmp_path, first, grown)
    for at, is_inside in ((512, True), (768, True), (1024, False), (1100, False)):
        probes = ProbeConfig(at_tokens=(at,), lag_tokens=256)
        refused = pytest.raises(UserError, match="not inside a stage with growth after it")
        with contextlib.nullcontext() if is_inside else refused:
            check_probes(dataclasses.replace(config, probes=probes))
