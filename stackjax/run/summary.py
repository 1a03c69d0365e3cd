"""The summary printed when a run ends."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stackjax.config import Config
from stackjax.data.source_metrics import of_sources
from stackjax.model.flops import num_params
from stackjax.run.goodput import describe_goodput
from stackjax.runtime.numbers import short
from stackjax.training.phase import Phase


def summarize(
    workdir: epath.Path, phases: Sequence[Phase], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Returns a finished run's summary: stages, growth, final loss and files."""
    lines = [
        "",
        f"{'stage':<6}{'layers':>7}{'params':>9}{'tokens':>10}{'6ND FLOPs':>11}  loss",
    ]
    for phase in phases:
        spent = phase.end.since(phase.start)
        lines.append(
            f"{phase.stage:<6}{phase.model.num_layers:>7}"
            f"{short(num_params(phase.model)):>9}{short(spent.tokens):>10}"
            f"{spent.flops_6nd:>11.2e}  {_last(rows, phase.index)}"
        )
    end = phases[-1].end
    lines.append(f"{'total':<22}{short(end.tokens):>10}{end.flops_6nd:>11.2e}")
    for row in rows:
        if row["kind"] == "growth":
            lines.append(
                f"growth into stage {row['stage']} at {short(row['tokens'])} tokens: held-out "
                f"loss {row['held_out_loss_before']:.4f} -> {row['held_out_loss']:.4f}"
            )
        if row["kind"] == "trigger":
            lines.append(f"stage {row['stage']} ended early: {row['reason']}")
        if row["kind"] == "probe":
            lines.append(f"at {short(row['tokens'])} tokens: {describe_probe(row)}")
    if (goodput := describe_goodput(rows)) is not None:
        lines.append(goodput)
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    final = evaluations[-1]["held_out_loss"] if evaluations else math.nan
    lines += [
        *_sources(evaluations[-1] if evaluations else {}),
        f"final held-out loss {final:.4f} after {end.tokens:,} tokens, "
        f"{end.flops_6nd:.3e} FLOPs (6ND), {end.flops:.3e} FLOPs of matrix products",
        f"metrics   {workdir / 'metrics.jsonl'}",
        f"model     {workdir / phases[-1].directory / str(phases[-1].num_steps)}",
    ]
    return "\n".join(lines)


def _sources(row: Mapping[str, Any]) -> list[str]:
    """Returns a line for each source in an evaluation row of a mixture."""
    losses = of_sources("held_out_loss", row)
    return [
        f"source {name}: {epochs:.2f} epochs, held-out loss {losses[name]:.4f}"
        for name, epochs in of_sources("epochs", row).items()
    ]


def how_to_train_longer(config: Config) -> str:
    """Returns the message after starting a finished run again."""
    stage = config.stages[-1]
    field, value = "tokens", f"{2 * (stage.tokens or 0)}"
    if stage.tokens is None:
        field, value = "fraction", f"{(1 + (stage.fraction or 0)) / 2:.3g}"
    return (
        f"This run is finished. To train it longer, make its last stage longer, such as with "
        f"--stages.{len(config.stages) - 1}.{field} {value}; or start a new run with "
        f"--workdir DIR."
    )


def describe_probe(row: Mapping[str, Any]) -> str:
    """Returns a growth probe's result as text."""
    # Infinity and NaN are null in the file.
    before, grown, lagged = (
        f"{math.nan if row[name] is None else row[name]:.4f}"
        for name in ("loss_before", "loss_grown", "loss_lagged")
    )
    return (
        f"probe of {row['growth']}: held-out loss {before} -> {grown}, {lagged} after another "
        f"{short(row['lag_tokens'])} tokens"
    )


def _last(rows: Sequence[Mapping[str, Any]], phase: int) -> str:
    losses = [row["loss"] for row in rows if row["kind"] == "train" and row["phase"] == phase]
    return f"{losses[-1]:.4f}" if losses else "-"
