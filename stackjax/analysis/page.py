"""A self-contained HTML page, without scripts or network access."""

import dataclasses
import html
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from stackjax.analysis.plots import svg
from stackjax.analysis.tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --line: #d5d5da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --paper: #141416; --line: #3a3a40; }
}
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
figure { margin: 0; max-width: 34rem; } svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """Figures with captions, under a heading."""

    title: str
    figures: Mapping[str, tuple[Figure, str]]
    """Figure and caption, by file name."""

    def html(self) -> str:
        """Returns the figures in HTML, side by side on wide screens."""
        shown = "".join(
            f"<figure>{svg(figure)}<figcaption>{html.escape(sentence)}</figcaption></figure>\n"
            for figure, sentence in self.figures.values()
        )
        return f'<h2>{html.escape(self.title)}</h2>\n<div class="figures">\n{shown}</div>\n'


def page(
    title: str,
    verdicts: Sequence[str],
    figures: Sequence[Figure],
    sections: Sequence[Table | Gallery],
) -> str:
    """Returns the page."""
    said = "".join(f"<p>{html.escape(line)}</p>\n" for line in verdicts)
    shown = "".join(f"<figure>{svg(figure)}</figure>\n" for figure in figures)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An empty icon, so browsers do not request one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{said}"
        f'<div class="figures">\n{shown}</div>\n'
        f"{''.join(section.html() for section in sections)}</body>\n</html>\n"
    )
