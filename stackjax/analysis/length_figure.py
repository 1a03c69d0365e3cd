"""Document lengths as a figure: documents and tokens by length."""

import math

import numpy as np
from matplotlib.axes import Axes as Plot
from matplotlib.figure import Figure

from stackjax.analysis.plots import COLORS, INK, in_ink, sign
from stackjax.data.length_counts import LengthCounts

SEQ_LENS = (512, 2048, 8192, 32768, 131072)
"""Common sequence lengths, in tokens."""
_PER_OCTAVE = 2


def length_figure(counts: LengthCounts, path: str) -> Figure:
    """Returns the histogram of document lengths of a split with documents.

    Both curves have an area of 100 %. A line at each sequence length has the share of
    documents with at most this length.

    Args:
      path: The data set, for the small print.
    """
    figure = _draw(counts)
    documents, tokens = f"{counts.documents:,}", f"{counts.tokens:,}"
    return sign(figure, [f"{path}: {documents} training documents, {tokens} tokens"])


@in_ink
def _draw(counts: LengthCounts) -> Figure:
    figure = Figure(figsize=(4.4, 3.3), dpi=200, layout="constrained")
    plot: Plot = figure.subplots()
    edges = _edges(counts)
    below = np.array([counts.up_to(int(edge)) for edge in edges], float)
    octaves = np.diff(np.log2(edges))
    for name, column, color in (("documents", 0, COLORS[1]), ("tokens", 1, COLORS[0])):
        density = 100 * np.diff(below[:, column]) / below[-1, column] / octaves
        plot.stairs(density, edges, color=color, lw=1.3, label=name)
        plot.stairs(density, edges, color=color, alpha=0.15, fill=True)
    plot.set_xscale("log", base=2)
    plot.set_xlim(edges[0], edges[-1])
    plot.set_ylim(0, 1.3 * plot.get_ylim()[1])
    for seq_len in SEQ_LENS:
        if edges[0] < seq_len < edges[-1]:
            _mark(plot, seq_len, counts.up_to(seq_len)[0] / counts.documents)
    plot.xaxis.set_major_formatter("{x:,.0f}")
    plot.tick_params(labelsize=8)
    plot.set_xlabel("tokens in a document")
    plot.set_ylabel("share per doubling of the length, %")
    plot.grid(alpha=0.2)
    plot.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def _edges(counts: LengthCounts) -> np.ndarray:
    """Returns whole numbers at equal distances on a log axis; 0.5 stands for 0."""
    first, *_, last = counts.octaves() * 2
    stop = _PER_OCTAVE * int(math.log2(last.up_to))
    start = _PER_OCTAVE * int(math.log2(first.longer_than)) if first.longer_than else 0
    powers = np.arange(start, stop + 1) / _PER_OCTAVE
    edges = np.unique(np.rint(2**powers))
    return edges if first.longer_than else np.array([0.5, *edges])


def _mark(plot: Plot, seq_len: int, share: float) -> None:
    """Draws a line at a sequence length, with the share of documents that fit."""
    plot.axvline(seq_len, color=INK, ls=":", lw=0.8)
    plot.text(
        seq_len,
        0.99 * plot.get_ylim()[1],
        f"{seq_len:,}: {100 * share:.1f} % fit",
        rotation=90,
        ha="right",
        va="top",
        fontsize=6,
    )
