"""A progress bar on a terminal, or lines in a log."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


@contextlib.contextmanager
def progress_bar(
    task: str,
    total: int,
    *,
    in_bytes: bool = False,
    in_log: bool = False,
    is_shown: bool = True,
    console: rich.console.Console | None = None,
) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar.

    Args:
      in_bytes: Is the total in bytes, and shown?
      in_log: Print a line every 10 % if the output is no terminal?
      console: Terminal for the bar; by default stdout.
    """
    columns = list(rich.progress.Progress.get_default_columns())
    if in_bytes:
        columns.append(rich.progress.DownloadColumn())
    is_terminal = sys.stdout.isatty() if console is None else console.is_terminal
    is_bar = is_shown and is_terminal
    done = printed = 0

    def advance(amount: int) -> None:
        nonlocal done, printed
        done += amount
        bar.update(bar_task, completed=done)
        percent = 100 * done // max(total, 1)
        if in_log and is_shown and not is_bar and percent >= printed + 10:
            printed = percent
            print(f"{task}: {percent} % of {total / 1e6:.1f} MB", flush=True)

    with rich.progress.Progress(*columns, console=console, disable=not is_bar) as bar:
        bar_task = bar.add_task(task, total=total)
        yield advance
