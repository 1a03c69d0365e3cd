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


def check_page(name: str, page: Path | None) -> None:
    """Raises UserError if a page lacks a name's markers."""
    if page is not None:
        _markers(page, name)


def _markers(page: Path, name: str) -> tuple[str, str]:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = page.read_text() if page.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{page} must have one {begin} and one {end}.")
    return begin, end


def replace_table(page: Path, name: str, table: str) -> None:
    """Replaces the table between a name's markers; UserError if markers are missing."""
    begin, end = _markers(page, name)
    text = page.read_text()
    head, rest = text.split(begin)
    page.write_text(f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}")
