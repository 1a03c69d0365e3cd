"""The summary shows rows and phases."""

import pytest
from conftest import tiny_run
from etils import epath

from stackjax.run.summary import summarize
from stackjax.training.expand import expand

ROWS = [
    {"kind": "train", "phase": 0, "loss": 3.25},
    {"kind": "train", "phase": 0, "loss": 3.0},
    {
        "kind": "growth",
        "phase": 1,
        "stage": 1,
        "tokens": 640,
        "held_out_loss_before": 3.125,
        "held_out_loss": 3.5,
    },
    {"kind": "train", "phase": 1, "loss": 2.75},
    {"kind": "evaluation", "phase": 1, "held_out_loss": 3.375},
    {"kind": "evaluation", "phase": 1, "held_out_loss": 2.875},
]


@pytest.fixture
def text():
    return summarize(epath.Path("/runs/a"), expand(tiny_run()), ROWS)


def test_summary_has_a_line_per_stage(text):
    stages = [line.split() for line in text.splitlines() if line[:1] in ("0", "1")]
    assert [(s[0], s[1], s[3], s[-1]) for s in stages] == [
        ("0", "3", "640", "3.0000"),
        ("1", "6", "1.28k", "2.7500"),
    ]


def test_totals_sum_over_stages(text):
    end = expand(tiny_run())[-1].end
    (total,) = (line.split() for line in text.splitlines() if line.startswith("total"))
    assert total == ["total", "1.92k", f"{end.flops_6nd:.2e}"]
    assert f"{end.flops:.3e} FLOPs of matrix products" in text


def test_summary_shows_growth_final_loss_and_files(text):
    assert "growth into stage 1 at 640 tokens: held-out loss 3.1250 -> 3.5000" in text
    assert "final held-out loss 2.8750 after 1,920 tokens" in text
    assert "/runs/a/metrics.jsonl" in text
    assert "/runs/a/stage_1/train/10" in text


def test_stage_without_rows_has_no_loss():
    text = summarize(epath.Path("/runs/a"), expand(tiny_run()), ROWS[3:])
    (first,) = (line.split() for line in text.splitlines() if line.startswith("0"))
    assert first[-1] == "-"
