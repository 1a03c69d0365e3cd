"""What a command has found, as files: Markdown, JSON, pictures, and a page with all of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stackjax.analysis.page import page
from stackjax.analysis.plots import svg
from stackjax.analysis.tables import Table


def write_report(
    directory: Path,
    name: str,
    *,
    title: str,
    said: Sequence[str],
    figures: Mapping[str, Figure],
    tables: Sequence[Table],
    numbers: Any,
) -> str:
    """Writes NAME.md, NAME.json, a PNG for each figure and index.html; returns the Markdown.

    Args:
      title: Of the page.
      said: Sentences that stand above all else.
      numbers: A tree that JSON can hold.
    """
    markdown = "\n".join([*said, "", *(table.markdown() for table in tables)])
    directory.mkdir(parents=True, exist_ok=True)
    for figure_name, figure in figures.items():
        figure.savefig(directory / f"{figure_name}.png")
    (directory / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (directory / f"{name}.md").write_text(markdown)
    html = page(title, said, [svg(figure) for figure in figures.values()], tables)
    (directory / "index.html").write_text(html)
    return f"{markdown}\n{directory / 'index.html'}: all of this, with pictures"
