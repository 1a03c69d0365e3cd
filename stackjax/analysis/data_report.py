"""The report of `data`: text, JSON and a picture."""

from pathlib import Path

from etils import epath
from rich.console import Console

from stackjax.analysis.length_figure import length_figure
from stackjax.data.view import to_json, view
from stackjax.data.view_config import DataViewConfig
from stackjax.data.view_text import show
from stackjax.files.output import check_writable, write_json
from stackjax.files.storage import replacement
from stackjax.runtime.errors import UserError


def data_report(options: DataViewConfig) -> str:
    """Writes the files of a data set's options and returns the text.

    Raises:
      UserError: An option is wrong, or a data set is missing or damaged.
      OSError: A file cannot be read or written.
    """
    if options.json is not None:
        check_writable("--json", options.json)
    if options.picture is not None:
        _check_picture(options.picture)
    found = view(options)
    if options.picture is not None:
        if "train" not in found.lengths:
            raise UserError(
                f"--picture is {options.picture}, but {options.directory!r} has no training "
                f"documents; leave it out."
            )
        figure = length_figure(found.lengths["train"], found.path)
        with replacement(epath.Path(options.picture)) as temporary:
            figure.savefig(temporary, format="png")
    if options.json is not None:
        write_json(options.json, to_json(found))
    console = Console()
    is_colored = console.is_terminal and not console.no_color
    return show(found, console.width, is_colored=is_colored)


def _check_picture(path: Path) -> None:
    if path.suffix != ".png":
        raise UserError(f"--picture is {path}; it must end in .png.")
    check_writable("--picture", path)
