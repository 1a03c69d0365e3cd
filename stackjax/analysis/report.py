"""Report files: Markdown, JSON, figures and an HTML page."""

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
      title: Page title.
      said: Sentences at the top.
      numbers: Tree for the JSON file; NaN and infinity become null.
      galleries: Figures below the tables.
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
    return f"{text}\n{directory / 'index.html'} has all tables and figures"


def _finite(value: Any) -> Any:
    """Returns a tree with NaN and infinity replaced by None."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
