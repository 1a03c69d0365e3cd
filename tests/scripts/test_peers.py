"""Comparisons with other codebases: turns, medians, ratios and errors. All peers are fake."""

import importlib.metadata
import io
import json
import sys

import pytest

from scripts.peers.__main__ import PeersConfig, installed, interpreters, measure
from scripts.peers.peer import SHAPES, Peer
from scripts.peers.report import BY_RATIO, contents, medians, origin, table
from scripts.peers.worker import serve
from stackjax.runtime.errors import UserError

FAKE = """
import json, os, sys
name, seconds = sys.argv[1], json.loads(sys.argv[2])
def answer(**fields): print(json.dumps(fields), flush=True)
answer(num_params=7)
answer(losses=[6.0, 5.0])
for request, value in zip(sys.stdin, seconds):
    open(os.environ["TURNS"], "a").write(name + request)
    answer(seconds=value, loss=4.0, peak_rss_mb=value)
"""
# Seconds per round; a round has two steps with 8 x 256 tokens each.
SECONDS = {"stackjax": [1.0, 0.5, 2.0], "plain": [2.0, 1.0, 4.0], "litgpt": [0.5, 0.5, 0.5]}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("peers")
    (path / "fake.py").write_text(FAKE)
    commands = {
        name: [sys.executable, "-I", str(path / "fake.py"), name, json.dumps(seconds)]
        for name, seconds in SECONDS.items()
    }
    found = measure(commands, {"TURNS": str(path / "turns")}, path, rounds=3, steps=2)
    turns = (path / "turns").read_text().split()
    assert turns == [f"{name}2" for name in SECONDS] * 3, "peers take turns"
    return found


def test_throughput_is_the_median_over_rounds(measured):
    known = medians(measured, "tiny")
    assert known["stackjax"] == 2 * 8 * 256 / 1.0
    assert known["plain"] == 2 * 8 * 256 / 2.0
    for name, ratio in BY_RATIO["tiny"].items():
        assert known[name] == ratio * known["plain"]


def test_table_is_sorted_with_ratios_to_the_fastest_jax_peer(measured):
    lines = table(measured, "tiny").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-2]]
    assert "over plain" in lines[0]
    assert [row[0] for row in rows] == ["litgpt", "stackjax", "plain", "levanter", "nanodo"]
    # The tenth percentile of three values: 0.8 of the first plus 0.2 of the second.
    assert rows[1][1:5] == ["4,096", "2,458", "7,373", "2.00"]
    assert rows[1][6:] == ["2", "6.00 to 4.00"]
    assert [row[4] for row in rows] == ["4.00", "2.00", "1.00", "0.91", "0.90"]
    assert rows[3][-1] == "by ratio to plain"
    assert lines[-1] == "Parameters: 7 in all of them."


def test_without_jax_peer_the_fastest_peer_is_the_reference(measured):
    alone = {name: measured[name] for name in ("stackjax", "litgpt")}
    assert "over litgpt" in table(alone, "tiny")


def test_file_is_json_with_every_round(measured):
    written = json.loads(json.dumps(contents(measured, "tiny", {"environment": {}})))
    assert written["peers"]["plain"]["seconds"] == SECONDS["plain"]
    assert written["peers"]["plain"]["losses"] == [6.0, 5.0, 4.0, 4.0, 4.0]
    assert written["shape"]["vocab_size"] == 512


def test_table_has_date_machine_and_versions(measured):
    settings = {"date": "2026-11-28", "num_cores": 2, "cpu": "AMD EPYC"}
    settings["versions"] = {"jax": "0.11.2", "torch": "2.13.0"}
    assert origin(measured, settings) == (
        "2026-11-28, 3 turns of 2 steps on 2 cores of AMD EPYC: jax 0.11.2, torch 2.13.0."
    )


def test_crashed_worker_ends_the_comparison_with_its_log(tmp_path):
    command = [sys.executable, "-I", "-c", "raise RuntimeError('no such device')"]
    with pytest.raises(SystemExit, match="no such device"):
        measure({"plain": command}, {}, tmp_path, rounds=1, steps=1)


def falling(by: float) -> Peer:
    """Returns a peer with the loss as state; each step reduces the loss by `by`."""
    return Peer(
        step=lambda loss, by: (loss - by, loss),
        state=6.0,
        batch=by,
        wait=lambda _: None,
        num_params=1,
    )


def test_worker_answers_each_line_with_times():
    answers = io.StringIO()
    serve(falling(0.5), ["2\n", "3\n"], answers)
    started, warm, first, second = map(json.loads, answers.getvalue().splitlines())
    assert started == {"num_params": 1}
    assert warm["losses"] == [6.0, 5.0]
    # Each line first runs an extra step.
    assert (first["loss"], second["loss"]) == (3.5, 1.5)
    assert first["seconds"] > 0
    assert first["peak_rss_mb"] > 1


def test_step_without_progress_is_refused():
    with pytest.raises(ValueError, match=r"the loss went from 6.0 to 6.0"):
        serve(falling(0.0), [], io.StringIO())


def test_peer_uses_its_named_python():
    config = PeersConfig(shape="tiny", peers=("plain", "maxtext"), python=("maxtext=/a=b",))
    assert interpreters(config) == {"plain": sys.executable, "maxtext": "/a=b"}


@pytest.mark.parametrize("pair", ["litgpt=/python", "/python", "plain="])
def test_python_for_unknown_peer_is_refused(pair):
    config = PeersConfig(shape="tiny", peers=("plain",), python=(pair,))
    with pytest.raises(UserError, match="is not PEER=PATH"):
        interpreters(config)


def test_versions_of_all_pythons_are_listed():
    jax = importlib.metadata.version("jax")
    torch, transformers = map(importlib.metadata.version, ("torch", "transformers"))
    pythons = dict.fromkeys(("stackjax", "plain", "transformers"), sys.executable)
    assert installed(pythons) == {"jax": jax, "torch": torch, "transformers": transformers}


def test_peers_of_different_versions_are_refused(tmp_path):
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 0.0.1\n")
    other.chmod(0o755)
    with pytest.raises(UserError, match=r"one version of jax; found .*'0\.0\.1'"):
        installed({"stackjax": sys.executable, "plain": str(other)})


def test_missing_peer_package_is_named():
    with pytest.raises(SystemExit, match=r"litgpt needs .* in"):
        installed({"litgpt": sys.executable})


def test_shapes_split_channels_over_heads():
    for shape in SHAPES.values():
        assert shape.head_dim * shape.num_heads == shape.embed_dim
        assert shape.tokens().shape == (shape.batch_size, shape.seq_len + 1)
        assert shape.tokens().max() < shape.vocab_size
