"""Tables as plain text and as Markdown."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], align: str = "<") -> str:
    """Returns rows as lines with aligned columns; `align` is `<` or `>`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{align}{n}}" for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; cells are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
