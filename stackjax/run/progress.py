"""Progress on the terminal: a bar, lines or nothing."""

import contextlib
import sys
import time
from collections.abc import Iterator

import jax
import rich.console
import rich.progress

from stackjax.run.sinks import Row
from stackjax.runtime.numbers import short


class Progress:
    """Shows nothing."""

    def row(self, row: Row, total_tokens: int, seconds_left: float) -> None:
        """Shows a train row, the run's total tokens and the remaining time."""

    def note(self, text: str) -> None:
        """Shows a line."""

    def close(self) -> None:
        """Stops the display."""


def open_progress() -> Progress:
    """Returns a bar on a terminal, lines elsewhere, and silence outside process 0."""
    if jax.process_index() != 0:
        return Progress()
    console = rich.console.Console()
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        return Bar(console)
    return Lines()


@contextlib.contextmanager
def timed(progress: Progress, task: str) -> Iterator[None]:
    """Shows that a task starts, then the seconds taken."""
    progress.note(f"{task} ...")
    start = time.monotonic()
    yield
    progress.note(f"{task} took {time.monotonic() - start:.1f} s")


class Lines(Progress):
    """Shows each row as a line with aligned columns."""

    def row(self, row: Row, total_tokens: int, seconds_left: float) -> None:
        """Prints a train row."""
        print("  ".join(_columns(row, total_tokens, seconds_left).values()), flush=True)

    def note(self, text: str) -> None:
        """Prints a line."""
        print(text, flush=True)


class Bar(Progress):
    """Shows the last row beside a bar, and notes above the bar."""

    def __init__(self, console: rich.console.Console):
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.fields[stage]}", markup=False),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            expand=True,
            auto_refresh=False,  # only rows move the bar, so no thread is needed
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=None, stage="", numbers="")

    def row(self, row: Row, total_tokens: int, seconds_left: float) -> None:
        """Moves the bar to a train row."""
        columns = _columns(row, total_tokens, seconds_left)
        names = ("loss", "rate", "mfu", "eta")
        self._bar.update(
            self._task,
            total=total_tokens,
            completed=row["tokens"],
            stage=columns["stage"],
            numbers="  ".join(columns[name] for name in names if name in columns),
            refresh=True,
        )

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Stops the bar."""
        self._bar.stop()


def _columns(row: Row, total_tokens: int, seconds_left: float) -> dict[str, str]:
    rate = row["tokens_per_second"]
    columns = {
        "stage": f"stage {row['stage']}",
        "tokens": f"{short(row['tokens']):>5}/{short(total_tokens)} tokens",
        "loss": f"loss {row['loss']:6.3f}",
        "learning_rate": f"lr {row['learning_rate']:.1e}",
        "grad_norm": f"grad {row['grad_norm']:5.2f}",
        "rate": f"{short(rate):>5} tok/s",
    }
    if row.get("mfu") is not None:
        columns["mfu"] = f"mfu {100 * row['mfu']:4.1f}%"
    columns["eta"] = f"eta {_duration(seconds_left)}"
    return columns


def _duration(seconds: float) -> str:
    """Returns a duration as [hours:]minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
