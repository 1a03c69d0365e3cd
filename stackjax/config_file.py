"""Configs as files: loaded, overridden on the command line, recorded, and compared."""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import tyro
from etils import epath

from stackjax.config import Config
from stackjax.data.manifest import Manifest
from stackjax.errors import UserError
from stackjax.growth import Growth, parse_growth
from stackjax.growth.text import replace_field
from stackjax.storage import replace_text

_RECORD = "config.json"
_GROWTH_FLAG = re.compile(
    r"--stages\.(?P<stage>\d+)\.growth(\.(?P<field>[\w-]+))?(=(?P<text>.*))?", re.DOTALL
)

_MAY_CHANGE = re.compile(
    r"workdir|platform|(mesh|evaluation|probes|tasks|checkpoints|logging)\..*"
    r"|stages\.\d+\.(mesh(\..*)?|accumulate)"
    r"|data\.(path|cache_dir|corpus|num_workers|prefetch)"
    r"|model\.(attention|remat|scan_unroll|loss_chunk)"
)
"""Fields that a run may be resumed with other values of: they do not change what is learnt,
other than by the order in which floats are added; and, for a stage that ends at a loss or on a
plateau, when that is seen."""


def load_config(prog: str, args: list[str]) -> Config:
    """Returns the config that a command line names, with its overrides.

    Args:
      prog: How the command is called, for its help.
      args: `--config FILE` and any field of `Config`, such as `--stages.1.tokens 2e6`.

    Raises:
      UserError: The file is missing, cannot be run, or returns no config.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", type=Path)
    known, overrides = parser.parse_known_args(args)
    if known.config is None:
        raise UserError(
            f"no config given; try `{prog} --config configs/tiny.py`, and add --help for "
            f"every field that can be overridden."
        )
    config, overrides = _override_growths(read_config(known.config), overrides)
    return tyro.cli(
        tyro.conf.AvoidSubcommands[Config],
        prog=f"{prog} --config {known.config}",
        default=config,
        args=overrides,
    )


def _override_growths(config: Config, args: list[str]) -> tuple[Config, list[str]]:
    """Returns a config with its growths, or fields of them, replaced, and other overrides.

    A growth is one value to the command line; `--stages.1.growth.factor 2` is ours, after
    any `--stages.1.growth` that stands before it.
    """
    stages, rest = list(config.stages), []
    remaining = iter(args)
    for arg in remaining:
        match = _GROWTH_FLAG.fullmatch(arg)
        stage = int(match["stage"]) if match else len(stages)
        growth = stages[stage].growth if stage < len(stages) else None
        if match is None or stage >= len(stages) or (match["field"] and growth is None):
            rest.append(arg)
            continue
        text = next(remaining, "") if match["text"] is None else match["text"]
        if growth is not None and match["field"]:
            growth = replace_field(growth, match["field"].replace("-", "_"), text)
        else:
            growth = None if text.lower() == "none" else parse_growth(text)
        stages[stage] = dataclasses.replace(stages[stage], growth=growth)
    return dataclasses.replace(config, stages=tuple(stages)), rest


def read_config(path: Path) -> Config:
    """Returns the config that a file defines; UserError if it defines none."""
    if not path.is_file():
        raise UserError(f"--config {path}: there is no such file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {path}: a config is a Python file, named *.py.")
    module = importlib.util.module_from_spec(spec)
    # Configs build on each other: `import tiny` works from beside it.
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except UserError:
        raise
    except Exception as error:  # The file is the user's code: anything may go wrong in it.
        frames, file = traceback.extract_tb(error.__traceback__), path.resolve()
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file]
        where = f", line {lines[-1]}" if lines else ""  # a SyntaxError says it itself
        raise UserError(f"--config {path}{where}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(config, Config):
        raise UserError(
            f"--config {path}: the file must define get_config() -> stackjax.config.Config."
        )
    return config


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Returns every field of a config by the name that the command line gives it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Growth):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple):
        fields = {str(i): item for i, item in enumerate(value)}
    else:
        return {path: str(value) if isinstance(value, Growth) else value}
    return {
        key: leaf
        for name, item in fields.items()
        for key, leaf in flatten(item, f"{path}.{name}" if path else name).items()
    }


def record_config(workdir: epath.Path, config: Config, manifest: Manifest) -> None:
    """Writes every field of the config, and which data it reads, into the run directory."""
    if jax.process_index() == 0:
        tokenizer = f"{manifest.tokenizer.name} {manifest.tokenizer.digest[:12]}"
        record = {
            "config": flatten(config),
            "data": manifest.digest,
            "tokenizer": tokenizer,
        }
        replace_text(workdir / _RECORD, json.dumps(record, indent=2) + "\n")


def check_same_data(workdir: epath.Path, manifest: Manifest) -> None:
    """Raises UserError if a run that is resumed would read other data than it did."""
    if json.loads((workdir / _RECORD).read_text())["data"] != manifest.digest:
        raise UserError(
            f"{workdir} was trained on another set of token shards than data.path now holds "
            f"(its tokenizer or its shards differ); bring that set back, or start a new run "
            f"with --workdir."
        )


def changed_fields(workdir: epath.Path, config: Config, stage: int) -> list[str]:
    """Returns a line for each field that differs from the config the run had.

    Args:
      stage: The stage that the run is in; those after it may still be changed.

    Raises:
      UserError: A field differs that a run cannot be resumed with.
    """
    old = json.loads((workdir / _RECORD).read_text())["config"]
    new = json.loads(json.dumps(flatten(config)))
    allowed, forbidden = [], []
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            line = f"{field}: {old.get(field)} -> {new.get(field)}"
            of_stage = re.match(r"stages\.(\d+)(\.until)?", field)
            # When the stage that a run is in ends may still be changed.
            is_open = of_stage is not None and int(of_stage[1]) + bool(of_stage[2]) > stage
            may_change = is_open or _MAY_CHANGE.fullmatch(field)
            (allowed if may_change else forbidden).append(line)
    if forbidden:
        also = f" These may change: {'; '.join(allowed)}." if allowed else ""
        raise UserError(
            f"{workdir} was trained with another config. These may not change when it is "
            f"resumed: {'; '.join(forbidden)}.{also} Take the old values, or start a new "
            f"run with --workdir."
        )
    return allowed
