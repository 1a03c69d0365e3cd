"""Predicted and measured steps side by side."""

import json
from pathlib import Path

import pytest

from scripts import device_check
from scripts.device_check import CheckConfig, check, commands
from stackjax.config_file import load_config
from stackjax.runtime.errors import UserError

FIT = {
    "programs": [
        {
            "name": f"stage {stage} {kind}",
            "peak_bytes": 2**31,
            "mfu": 0.5,
            "bounds": {"flops": 1.0, "memory": 1.5, "wire": 0.0, "estimate": 2.0},
        }
        for stage in (0, 1)
        for kind in ("step", "evaluation")
    ]
}
STEP = {"device_peak_bytes": 2.2 * 2**30, "median_seconds": 2.5, "mfu": 0.4}


@pytest.fixture
def options(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin measured -->\n<!-- end measured -->\n")
    return CheckConfig(devices="h100:1", results=tmp_path / "results", page=page)


def write_results(results: Path, *stages: int) -> None:
    (results / "fit.json").write_text(json.dumps(FIT))
    for stage in stages:
        rows = [{"section": "compile", "values": {}}, {"section": "step", "values": STEP}]
        (results / f"stage_{stage}.json").write_text(json.dumps({"rows": rows}))


def test_page_has_predicted_and_measured_steps(options, monkeypatch):
    def succeeds(name, command, log):
        write_results(options.results, 0, 1)
        return True

    monkeypatch.setattr(device_check, "_succeeds", succeeds)
    check(options, [])
    cells = "2.00 | 2.20 | 1.100 | 1.50 | 2.00 | 2.50 | 1.250 | 50.00 | 40.00"
    text = options.page.read_text()
    assert all(f"| stage {stage} | {cells} |" in text for stage in (0, 1))
    with pytest.raises(UserError, match=r"--results is .*results, which exists"):
        check(options, [])


def test_failed_command_is_named_after_all_other_results_are_written(options, monkeypatch):
    tried = []

    def succeeds(name, command, log):
        tried.append(name)
        write_results(options.results, 0)
        return name != "stage_1"

    monkeypatch.setattr(device_check, "_succeeds", succeeds)
    with pytest.raises(UserError, match=r"^stage_1 failed; see .*stage_1\.log"):
        check(options, [])
    assert tried == ["fit", "stage_0", "stage_1", "run"]
    assert "| stage 1 | 2.00 | - | - | 1.50 | 2.00 | - | - | 50.00 | - |" in (
        options.page.read_text()
    )


def test_number_that_could_not_be_measured_is_left_out(options):
    options.results.mkdir()
    rows = [{"section": "step", "values": {"not_measured": "too little memory"}}]
    (options.results / "stage_0.json").write_text(json.dumps({"rows": rows}))
    table = device_check.comparison(options.results, 1)
    assert table.endswith("| stage 0 | - | - | - | - | - | - | - | - | - |")


def test_all_commands_have_the_same_batch_and_overrides(options):
    overrides = ["--data.seq-len", "1024"]
    config = load_config("test", ["--config", str(options.config), *overrides])
    found = commands(options, config, overrides)
    fit = found["fit"][found["fit"].index("--config") : found["fit"].index("--devices")]
    run = found["run"][found["run"].index("--config") :]
    predicted, trained = (load_config("test", arguments) for arguments in (fit, run))
    for each in (predicted, trained):
        assert each.data.seq_len == 1024
        assert [(s.batch_size, s.accumulate) for s in each.stages] == [(16, 2)] * 2
    assert [stage.tokens for stage in trained.stages] == [5 * 16 * 1024] * 2
    for stage in (0, 1):
        measured = found[f"stage_{stage}"]
        assert measured[measured.index("--phases") + 1] == str(stage)
        assert set(fit[2:]) <= set(measured)


def test_output_of_a_command_is_shown_and_kept(tmp_path, capfd):
    log = tmp_path / "log"
    assert not device_check._succeeds("false", ["sh", "-c", "echo said; exit 3"], log)
    assert log.read_text() == "said\n"
    assert capfd.readouterr().out == "false: sh -c echo said; exit 3\nsaid\n"
