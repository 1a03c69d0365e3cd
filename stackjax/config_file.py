"""Config files: loading, command-line overrides, records in run directories, comparison."""

import argparse
import dataclasses
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from etils import epath

from stackjax.config import Config, Stage
from stackjax.config_record import RECORD, config_record, read_config_record, recorded_seq_len
from stackjax.data.manifest import Manifest, data_digest
from stackjax.files.json_file import Fields
from stackjax.files.python_file import load_function
from stackjax.files.storage import replace_text
from stackjax.growth.base import Growth
from stackjax.optimizers import AdamW, Optimizer, find_optimizer
from stackjax.runtime.command_line import parse
from stackjax.runtime.errors import UserError

_GROWTH_FLAG = re.compile(
    r"--stages\.(?P<stage>\d{1,9})\.growth(\.(?P<field>[\w-]+))?(=(?P<text>.*))?", re.DOTALL
)

_MAY_CHANGE = re.compile(
    r"workdir|platform|(mesh|probes|spikes|checkpoints|logging)\..*"
    r"|evaluation\.(every_tokens|batch_size|layers)"
    r"|tasks\.(names|every_tokens|directory|batch_size)"
    r"|optimizer\.(peak_learning_rate|schedule\..*|epsilon|weight_decay|clip_norm|z_loss)"
    r"|stages\.\d+\.(mesh(\..*)?|(batch_steps\.\d+\.)?accumulate|remat|loss_chunk|moment_memory)"
    r"|data\.(path|sources\.\d+\.path|cache_dir|corpus|num_workers|prefetch)"
    r"|data\.(sources\.\d+\.)?max_epochs"
    r"|model\.(attention|remat|scan_unroll|loss_chunk|routing\.(balance_weight|bias_rate|z_loss))"
)
"""Fields that may change when a run resumes. Changes in the optimizer apply from the resumed
step on. Other fields do not change training, apart from the order of float additions, the steps
with a check for early stopping, and the checkpoints whose mean grows."""

_MAY_DIFFER = re.compile(r"data\.(path|sources\.\d+\.path|cache_dir|num_workers|prefetch)")
"""Fields that may differ between hosts; the hosts compare the data itself."""

_PLACE = re.compile(r"workdir|platform|(data|logging)\..*")
"""Fields without influence on training: paths, prefetching, logs."""

_PRESENT_STAGE = re.compile(
    r"stages\.\d+\.(tokens|fraction|until\..*|peak_learning_rate|schedule(\..*)?)"
)
"""Fields of the current stage that may change when a run resumes, besides batches."""

_BATCH = re.compile(
    r"stages\.\d+\.(batch_steps\.(?P<step>\d+)\.)?(?P<name>from_tokens|batch_size|accumulate)"
)
"""Fields of a stage's batches."""

_WHY_NOT = {
    r"model(_is)?\b.*": "the parameters in the checkpoints are those of this model",
    r"optimizer\.(name|moments_dtype)": "the optimizer state in the checkpoints has this form",
    r"optimizer\..*": "the moments in the checkpoints are averages with it",
    r"data\.seq_len": "the order of the data counts sequences of this length",
    r"data\.packing": "the order of the data counts sequences packed like this",
    r"data\.sources\..*": "the order of the data follows from it",
    r"data\.mask_documents": "losses before and after would not compare",
    r"evaluation\.num_sequences": "one curve has one set of held-out sequences",
    r"tasks\.(limit|num_fewshot)": "scores of one run are of the same questions",
    r"seed": "the initial values, the growth and the order of the data follow from it",
    r"init_from": "the run began with these parameters",
    r"stages\.\d+\.(growth|optimizer_|average_).*": "the model has already grown",
    r"stages\.\d+\.(seq_len|source_.*)": "the order of the data follows from it",
    r"stages\.\d+\.rope_.*": "the stage was trained with these positions",
    r"stages\..*": "this part of the stage is already trained",
}
"""Reason why a field may not change, by name pattern; the first match counts."""


Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Options of a command without options."""


@dataclasses.dataclass(frozen=True)
class _Command(Generic[Options]):
    """The config and the command's own options, with flags without a prefix."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    options: Annotated[Options, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OneStage(Config):
    """A config with AdamW and a single stage, for the help page."""

    optimizer: AdamW  # type: ignore
    """How parameters are updated; `--optimizer muon` takes another optimizer."""
    stages: tuple[Stage]  # type: ignore
    """The stages of the run, counted from 0; the first is shown here."""


@dataclasses.dataclass(frozen=True)
class _Page(Generic[Options]):
    """The help page without a config file."""

    file: Annotated[Path, tyro.conf.arg(name="config", metavar="FILE")]
    """Python file with get_config(); all other options override fields of its config."""
    options: Annotated[Options, tyro.conf.arg(name="")]
    config: Annotated[_OneStage, tyro.conf.arg(name="")]


def load_config(prog: str, args: list[str]) -> Config:
    """Returns the config of a command line, with overrides.

    Args:
      prog: The command, for the help page.
      args: `--config FILE` and any field of `Config`, such as `--stages.1.tokens 2e6`.

    Raises:
      UserError: The file is missing, cannot be run, or returns no config.
    """
    return load_command(prog, args, NoOptions())[0]


def load_command(prog: str, args: list[str], options: Options) -> tuple[Config, Options]:
    """Returns the config and the options of a command line.

    Args:
      prog: The command, for the help page.
      args: As for `load_config`, and any field of `options`.
      options: A dataclass of defaults.

    Raises:
      UserError: The file is missing, cannot be run, or returns no config.
      SystemExit: The help page was requested and printed.
    """
    path, overrides = config_argument(args)
    if path is None and {"-h", "--help"} & set(args):
        page = tyro.conf.AvoidSubcommands[_Page[type(options)]]  # type: ignore
        parse(page, prog=prog, description=Config.__doc__, args=["--help"])
    if path is None:
        raise UserError(
            f"no config given; try `{prog} --config configs/tiny.py`, and add --help for "
            f"every field that can be overridden."
        )
    config, overrides = _override_growths(read_config(path), overrides)
    config, overrides = _override_optimizer(config, overrides)
    command = _Command[type(options)](config, options)  # type: ignore
    found = parse(
        tyro.conf.AvoidSubcommands[_Command[type(options)]],  # type: ignore
        prog=f"{prog} --config {path}",
        description=Config.__doc__,
        default=command,
        args=overrides,
    )
    return found.config, found.options


def config_argument(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Returns the file after `--config` on a command line, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", type=Path, nargs="?")
    known, rest = parser.parse_known_args(args)
    return known.config, rest


def _override_growths(config: Config, args: list[str]) -> tuple[Config, list[str]]:
    """Returns a config with new growths, and all other overrides.

    tyro reads a growth as a single value. `--stages.1.growth.factor 2` is handled here, after
    any earlier `--stages.1.growth`.
    """
    # Not at the top: the operators import JAX, and `--help` does not.
    from stackjax.growth.text import parse_growth, replace_field

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


def _override_optimizer(config: Config, args: list[str]) -> tuple[Config, list[str]]:
    """Returns a config with the optimizer of `--optimizer NAME`, and other overrides.

    The new optimizer keeps all fields that both optimizers have.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--optimizer", "--optimizer.name", nargs="?", const="", type=str.lower)
    known, rest = parser.parse_known_args(args)
    if known.optimizer is None:
        return config, args
    kind = find_optimizer(known.optimizer)
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in vars(config.optimizer).items() if name in names}
    return dataclasses.replace(config, optimizer=kind(**values)), rest


def read_config(path: Path) -> Config:
    """Returns the config of a file; UserError if there is none."""
    get_config = load_function(path, "get_config")
    config = get_config() if get_config else None
    if not isinstance(config, Config):
        raise UserError(
            f"--config {path}: the file must define get_config() -> stackjax.config.Config."
        )
    return config


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Returns every config field by command-line name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Growth):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Optimizer):
            fields = {"name": value.name} | fields
    elif isinstance(value, tuple):
        fields = {str(i): item for i, item in enumerate(value)}
    else:
        return {path: str(value) if isinstance(value, Growth) else value}
    return {
        key: leaf
        for name, item in fields.items()
        for key, leaf in flatten(item, f"{path}.{name}" if path else name).items()
    }


def record_config(workdir: epath.Path, config: Config, manifests: Sequence[Manifest]) -> None:
    """Writes every config field, and the identity of the data, into the run directory."""
    info = manifests[0].tokenizer
    record = {
        "config": flatten(config),
        "data": data_digest(manifests),
        "tokenizer": f"{info.name} {info.digest[:12]}",
    }
    replace_text(workdir / RECORD, config_record(record))


def same_everywhere(config: Config) -> dict[str, Any]:
    """Returns the fields that must be equal on all hosts."""
    flat = flatten(config)
    return {name: flat[name] for name in flat if not _MAY_DIFFER.fullmatch(name)}


def check_same_data(workdir: epath.Path, manifests: Sequence[Manifest]) -> None:
    """Raises UserError if the data has changed since the run began."""
    if read_config_record(workdir / RECORD)["data"] != data_digest(manifests):
        raise UserError(
            f"{workdir} was trained on other token shards than its data paths now hold "
            f"(its tokenizer or its shards differ); bring that set back, or start a new run "
            f"with --workdir."
        )


def changed_fields(
    workdir: epath.Path, config: Config, stage: int, part: int = 0
) -> dict[str, str]:
    """Returns a line for each field that differs from the recorded config.

    A field newer than the record counts as recorded with its default.

    Args:
      stage: The current stage. Later stages may change in every field.
      part: The current part of the stage. Later batch steps may change in every field.

    Raises:
      UserError: A field has changed that must not change.
    """
    new = json.loads(json.dumps(flatten(config)))
    old = with_defaults(config, read_config_record(workdir / RECORD)["config"])
    changed = {
        field: f"{field}: {old.get(field)} -> {new.get(field)}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    }
    forbidden = [field for field in changed if not _may_change(field, stage, part)]
    if _longest(old) != _longest(new):  # the order of all stages depends on it
        forbidden += [field for field in changed if re.fullmatch(r"stages.*seq_len", field)]
    if forbidden:
        said = "; ".join(f"{changed[field]} ({_why_not(field)})" for field in forbidden)
        raise UserError(
            f"{workdir} was trained with another config. These fields may not change at a "
            f"resume: {said}. Use the old values, or start a new run with --workdir."
        )
    return changed


def with_defaults(config: Config, recorded: Fields) -> Fields:
    """Returns recorded fields, and the default of each field of a config newer than these."""
    newer = flatten(config).keys() - recorded.keys()
    return recorded | {field: _default(config, field, recorded) for field in newer}


def _longest(fields: Fields) -> int:
    """Returns the longest sequence of a run, in tokens."""
    stages = {int(match[1]) for name in fields if (match := re.match(r"stages\.(\d+)", name))}
    lengths = [recorded_seq_len(fields, stage) for stage in stages]
    return max((length for length in lengths if isinstance(length, int)), default=0)


def _default(config: Config, field: str, recorded: Collection[str]) -> Any:
    """Returns the default of a field newer than the record; None for any other field."""
    owner, path = config, ""
    for name in field.split("."):
        path = f"{path}.{name}" if path else name
        if path in recorded:
            return None  # a nested config, recorded as None
        if not any(known.startswith(f"{path}.") for known in recorded):
            fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
            defaults = {f.name: f.default for f in fields if f.default is not MISSING}
            return flatten(defaults.get(name), path).get(field)
        owner = owner[int(name)] if isinstance(owner, tuple) else getattr(owner, name)
    return None


def is_of_training(field: str) -> bool:
    """Returns whether a field influences training."""
    return _PLACE.fullmatch(field) is None


def _may_change(field: str, stage: int, part: int) -> bool:
    of_stage = re.match(r"stages\.(\d+)\.", field)
    if of_stage is not None and int(of_stage[1]) > stage:
        return True
    is_present = of_stage is not None and int(of_stage[1]) == stage
    if is_present and (_PRESENT_STAGE.fullmatch(field) or _is_of_coming_batch(field, part)):
        return True
    return _MAY_CHANGE.fullmatch(field) is not None


def _is_of_coming_batch(field: str, part: int) -> bool:
    """Returns whether a field is of a batch after the current one, or the current size."""
    batch = _BATCH.fullmatch(field)
    if batch is None:
        return False
    of_part = 0 if batch["step"] is None else int(batch["step"]) + 1
    return of_part > part or (of_part == part and batch["name"] == "batch_size")


def _why_not(field: str) -> str:
    return next(why for pattern, why in _WHY_NOT.items() if re.fullmatch(pattern, field))
