"""Commands as modules and in the console script `stackjax`."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stackjax.__main__ import COMMANDS, main
from stackjax.runtime.command_line import program

HELP = """
import contextlib, importlib, io, json, sys

from stackjax.__main__ import module_of

HEAVY = "jax flax optax orbax grain scipy matplotlib transformers torch pyarrow tensorboardX"
found = {}
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        importlib.import_module(module_of(name)).main()
    loaded = [each for each in HEAVY.split() if each in sys.modules]
    found[name] = [page.getvalue(), loaded]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def help_pages() -> dict[str, tuple[str, list[str]]]:
    """Each command's help page and loaded heavy packages."""
    command = [sys.executable, "-c", HELP, *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_config_and_loads_no_heavy_package(help_pages, name):
    page, loaded = help_pages[name]
    assert page.startswith(f"usage: python -m stackjax.{name} [-h]")
    assert loaded == []


def test_help_of_train_shows_every_kind_of_field(help_pages):
    page, _ = help_pages["train"]
    for option in ("--config FILE", "--resume-from", "--stages.0.growth", "--optimizer."):
        assert option in page


def test_modules_are_commands_library_and_schema():
    modules = {path.stem for path in Path("stackjax").glob("*.py")} - {
        "__init__",
        "__main__",
        "library",
    }
    modules |= {path.parent.name for path in Path("stackjax").glob("*/__main__.py")}
    schema = {"config", "config_file", "config_record", "options"}
    assert modules - schema == set(COMMANDS)


def test_console_script_runs_the_command_under_its_own_name(run_main):
    code, page, errors = run_main(main, "compare", "--help")
    assert (code, errors) == (0, "")
    assert page.startswith("usage: stackjax compare [-h]")
    assert program("train") == "stackjax train"


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_console_script_lists_every_command(run_main, args):
    code, page, errors = run_main(main, *args)
    assert (code, errors) == (0, "")
    assert all(f"\n  {name} " in page for name in COMMANDS)


def test_console_script_refuses_an_unknown_command_in_one_line(run_main):
    code, page, errors = run_main(main, "trian")
    assert (code, page) == (2, "")
    assert errors.startswith("error: 'trian' is not a command") and errors.count("\n") == 1


def test_requirements_files_and_package_extras_agree():
    project = tomllib.loads(Path("pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"]["file"] == "requirements.txt"
    for extra in ("cuda", "tpu", "interop", "dev"):
        setting = dynamic["optional-dependencies"][extra]
        files = setting["file"] if isinstance(setting["file"], list) else [setting["file"]]
        lines = Path(f"requirements-{extra}.txt").read_text().splitlines()
        assert lines == ["-r requirements.txt", *(f"-r {file}" for file in files)]
        assert not any("-r" in Path(file).read_text() for file in files)
