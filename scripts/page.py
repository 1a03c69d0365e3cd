"""Generated tables in Markdown pages."""

from pathlib import Path

from stackjax.runtime.errors import UserError


def write_table(table: str, name: str, output: Path, page: Path | None) -> None:
    """Writes a table into a page, or without a page into NAME.md of a directory; prints it."""
    if page is None:
        (output / f"{name}.md").write_text(f"{table}\n")
    else:
        replace_table(page, name, table)
    print(table)


def replace_table(page: Path, name: str, table: str) -> None:
    """Replaces the table between a name's markers; UserError if markers are missing."""
    text = page.read_text()
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{page} must have one {begin} and one {end}.")
    head, rest = text.split(begin)
    page.write_text(f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}")
