"""What a command has found, as files: Markdown, JSON, pictures, and a page with all of it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stackjax.analysis.page import Gallery, page
from stackjax.analysis.tables import Table, markdown


def write_report(
    directory: Path,
    name: str,
    *,
    title: str,
    said: Sequence[str],
    figures: Mapping[str, Figure],
    tables: Sequence[Table],
    numbers: Any,
    galleries: Sequence[Gallery] = (),
) -> str:
    """Writes NAME.md, NAME.json, a PNG for each figure and index.html; returns the Markdown.

    Args:
      title: Of the page.
      said: Sentences that stand above all else.
      numbers: A tree for JSON; what is not finite becomes null.
      galleries: Figures that stand below the tables.
    """
    lines = "\n\n".join(map(markdown, said))
    text = "\n".join([lines, "", *(table.markdown() for table in tables)])
    directory.mkdir(parents=True, exist_ok=True)
    below = {name: figure for each in galleries for name, (figure, _) in each.figures.items()}
    for figure_name, figure in (dict(figures) | below).items():
        figure.savefig(directory / f"{figure_name}.png")
    (directory / f"{name}.json").write_text(json.dumps(_finite(numbers), indent=1) + "\n")
    (directory / f"{name}.md").write_text(text)
    html = page(title, said, list(figures.values()), [*tables, *galleries])
    (directory / "index.html").write_text(html)
    return f"{text}\n{directory / 'index.html'}: all of this, with pictures"


def _finite(value: Any) -> Any:
    """Returns a tree of numbers that JSON can hold: what is not finite is null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
