"""Imports between the package's rooms point downward."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path("stackjax")
CONFIG = {"config", "config_file", "config_record", "options"}
# From lowest to highest. Commands are modules at the package root, or `__main__` in a room.
ROOMS = (
    *("runtime", "files", "sharding", "tokenizer", "data", "model", "growth", "optimizers"),
    *("config", "training", "checkpoint", "interop", "inference", "run", "accelerators"),
    *("analysis", "commands"),
)


def room(module: str) -> str:
    """Returns a module's room, such as `growth` for `growth.depth`."""
    name, _, rest = module.partition(".")
    if rest == "__main__":
        return "commands"
    if rest or (PACKAGE / name).is_dir():
        return name
    return "config" if name in CONFIG else "commands"


def imports(path: Path) -> set[str]:
    """Returns the rooms imported by a module."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stackjax."):
            modules.add(node.module.removeprefix("stackjax."))
        elif isinstance(node, ast.ImportFrom) and node.module == "stackjax":
            modules.update(alias.name for alias in node.names)
    return {room(module) for module in modules}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_module_imports_only_its_own_and_lower_rooms(path):
    module = ".".join(path.with_suffix("").relative_to(PACKAGE).parts)
    above = ROOMS[ROOMS.index(room(module)) + 1 :]
    assert not imports(path) & set(above)
