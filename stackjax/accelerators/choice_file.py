"""A config file with the result of a search."""

import json
import os.path
from collections.abc import Sequence
from pathlib import Path

from stackjax.accelerators.search import Choice

_FILE = '''\
"""Each stage runs as chosen by `stackjax fit --search` for {devices}."""

import dataclasses
from pathlib import Path

from stackjax.config import Config
from stackjax.config_file import read_config
from stackjax.sharding.config import MeshConfig

CHOICES = (
{choices}
)
"""How each stage runs, without influence on what it learns."""


def get_config() -> Config:
    """Returns the run; the other fields are those of the other file."""
    config = read_config(Path(__file__).parent / {path})
    stages = (
        dataclasses.replace(stage, **choice)
        for stage, choice in zip(config.stages, CHOICES, strict=True)
    )
    return dataclasses.replace(config, stages=tuple(stages))
'''


def choice_file(config: Path, target: Path, devices: str, choices: Sequence[Choice]) -> str:
    """Returns the source of a config file with a choice for each stage.

    Args:
      config: The config file that was searched for.
      target: The file that will have this source.
    """
    return _FILE.format(
        devices=devices,
        path=json.dumps(os.path.relpath(config, target.parent), ensure_ascii=False),
        choices="\n".join(map(_source, choices)),
    )


def _source(choice: Choice) -> str:
    fields = (
        f'        "{name}": {json.dumps(value) if isinstance(value, str) else repr(value)},\n'
        for name, value in vars(choice).items()
    )
    return f"    {{\n{''.join(fields)}    }},"
