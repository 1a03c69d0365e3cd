"""A plan's config file."""

import json
import os.path
import textwrap

from stackjax.analysis.architectures import nearest_rates
from stackjax.analysis.plan_text import timing_text
from stackjax.analysis.planning import Plan, batch_shards
from stackjax.options import PlanConfig
from stackjax.runtime.numbers import short

_WIDTH = 93
_FILE = '''\
"""{docstring}
"""

# Written by: {command}

{imports}
from stackjax.sharding.config import MeshConfig


def get_config() -> Config:
    """Returns the run; replace any field with dataclasses.replace."""
    small_tokens, tokens, factor = {small_tokens!r}, {tokens!r}, {factor}
{template}
    config = grown_run(template, factor, small_tokens, tokens)
    return dataclasses.replace(
        config,
        mesh={mesh!r},
        workdir={workdir},
    )
'''
_PAPER_IMPORTS = """\
import dataclasses

from stackjax.analysis.architectures import Rates, choose_model, paper_run
from stackjax.analysis.planning import grown_run
from stackjax.config import Config"""
_PAPER = """\
    model, _ = choose_model({params!r})
    # Learning rates of {name}; tune them.
    rates = Rates(small={rates.small!r}, target={rates.target!r})
    template = paper_run(
        model,
        rates,
        factor=factor,
        small_tokens=small_tokens,
        tokens=tokens,
        shards={shards},
    )"""
_CONFIG_IMPORTS = """\
import dataclasses
from pathlib import Path

from stackjax.analysis.planning import grown_run
from stackjax.config import Config
from stackjax.config_file import read_config"""
_CONFIG = """\
    template = read_config(
        Path(__file__).parent / {path},
    )"""


def config_text(plan: Plan, options: PlanConfig, command: str) -> str:
    """Returns a config file's source for the planned run.

    Args:
      command: The command line, for a comment.
    """
    small, target = plan.stages
    says = [
        f"G_stack (arXiv:2405.15319): {small.num_layers} layers for {short(small.tokens)} "
        f"tokens, then {target.num_layers} for {short(target.tokens)}.",
        f"{timing_text(plan)}.",
        *plan.warnings,
    ]
    docstring = "\n\n".join(textwrap.fill(each, _WIDTH) for each in says)
    imports, template = _template(plan, options)
    return _FILE.format(
        docstring=docstring.replace("\\", r"\\").replace('"', r"\""),
        command=_printable(command),
        imports=imports,
        template=template,
        small_tokens=plan.timing.tokens,
        tokens=plan.tokens,
        factor=plan.factor,
        mesh=plan.config.mesh,
        workdir=_text(plan.config.workdir),
    )


def _template(plan: Plan, options: PlanConfig) -> tuple[str, str]:
    """Returns the imports and the code for the run before planning."""
    if options.config is None or options.write is None:
        rates, name = nearest_rates(plan.params)
        shards = batch_shards(plan.config.mesh, plan.num_devices)
        return _PAPER_IMPORTS, _PAPER.format(
            params=plan.params, name=name, rates=rates, shards=shards
        )
    path = os.path.relpath(options.config, options.write.parent)
    return _CONFIG_IMPORTS, _CONFIG.format(path=_text(path))


def _text(value: str) -> str:
    """Returns a string literal in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _printable(text: str) -> str:
    """Returns a text on a single line, with unprintable characters escaped."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
