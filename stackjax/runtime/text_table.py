"""Tables as plain text and as Markdown."""

import itertools
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], align: str = "<") -> str:
    """Returns rows as lines with aligned columns.

    Args:
      align: `<` or `>` for each column; the last one also for all columns after it.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = [*align, *itertools.repeat(align[-1], len(widths) - len(align))]
    return "\n".join(
        "  ".join(
            f"{cell:{sign}{width}}"
            for cell, sign, width in zip(row, signs, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; cells are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
