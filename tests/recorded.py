"""Run directories with a config and rows of metrics, written without training."""

import json

from stackjax.config_file import flatten


def record_run(path, config, rows, *, data="shards", tokenizer="bytes", **fields):
    """Writes a run directory; returns the path.

    Args:
      fields: Config fields, by command-line name.
    """
    record = {
        "config": json.loads(json.dumps(flatten(config))) | fields,
        "data": data,
        "tokenizer": tokenizer,
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(record))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(kind, stage, flops, loss, tokens=None):
    """Returns a row; a token costs 1e6 FLOPs, and two devices train 1000 tokens/s."""
    found = {"kind": kind, "phase": stage, "stage": stage, "step": 1, "examples": 1}
    tokens = int(flops / 1e6) if tokens is None else tokens
    found |= {"tokens": tokens, "flops_6nd": int(flops), "flops": int(2 * flops)}
    if kind == "train":
        found |= {"loss": loss, "tokens_per_second": 1000.0, "num_devices": 2}
    if kind == "evaluation":
        found["held_out_loss"] = loss
    return found


def seam(stage, flops, tokens=None):
    """Returns a growth row."""
    losses = {"held_out_loss_before": 3.5, "held_out_loss": 4.0}
    return row("growth", stage, flops, None, tokens) | losses
