"""Errors on the command line, in the same form for every command."""

import dataclasses
import importlib
import re

import pytest

from stackjax.runtime.command_line import parse
from stackjax.runtime.errors import UserError

COMMANDS = {
    "scripts.bakeoff": ["a.py"],
    "scripts.benchmark": ["configs/tiny.py"],
    "scripts.peers.__main__": ["--shape", "tiny"],
    "scripts.performance": ["a.json"],
    "scripts.scale": ["a.py"],
    "scripts.sweep": ["a.py", "--tokens", "5"],
    "stackjax.compare": ["a"],
    "stackjax.convert": ["a", "b"],
    "stackjax.evaluate": ["a"],
    "stackjax.fit": ["--config", "configs/tiny.py"],
    "stackjax.generate": ["a"],
    "stackjax.grow": ["a", "b", "--growth", "stack(2)"],
    "stackjax.inspect": ["a"],
    "stackjax.isoflop": ["a"],
    "stackjax.plan": ["--config", "configs/tiny.py"],
    "stackjax.prepare": ["a", "b", "--tokenizer", "bytes"],
    "stackjax.scale": ["a"],
    "stackjax.tokenizer.__main__": ["a", "--vocab-size", "300"],
    "stackjax.train": ["--config", "configs/tiny.py"],
}
"""Each command with the required arguments."""

WRONG_VALUES = [
    ("scripts.bakeoff", "--seeds", "0", "seeds is 0"),
    ("scripts.benchmark", "--steps", "-1", "steps is -1"),
    ("scripts.benchmark", "--seed", "-1", "seed is -1"),
    ("scripts.peers.__main__", "--rounds", "0", "rounds is 0"),
    ("scripts.performance", "--page", "gs://b/x", "page is 'gs:/b/x'"),
    ("scripts.scale", "--jobs", "x", "--jobs: 'x' is not a whole number"),
    ("scripts.sweep", "--seeds", "x", "--seeds is 'x'"),
    ("scripts.sweep", "--flops", "nan", "flops is nan"),
    ("stackjax.compare", "--losses", "-1", "losses.0 is -1.0"),
    ("stackjax.convert", "--dtype", "int8", "--dtype is 'int8'"),
    ("stackjax.evaluate", "--limit", "0", "limit is 0"),
    ("stackjax.fit", "--devices", "h800:8", "--devices is 'h800:8'"),
    ("stackjax.generate", "--max-tokens", "0", "max_tokens is 0"),
    ("stackjax.generate", "--temperature", "-1", "temperature is -1.0"),
    ("stackjax.generate", "--temperature", "inf", "temperature is inf"),
    ("stackjax.grow", "--seed", "1.5", "--seed: '1.5' is not a whole number"),
    ("stackjax.inspect", "--json", "x", "'x' is not an option or a value of an option"),
    ("stackjax.isoflop", "--loss", "x", "--loss is 'x'"),
    ("stackjax.plan", "--factor", "1", "factor is 1"),
    ("stackjax.prepare", "--num-processes", "x", "--num-processes is 'x'"),
    ("stackjax.scale", "--output", "s3://b", "output is 's3:/b'"),
    ("stackjax.tokenizer.__main__", "--max-bytes", "0", "max_bytes is 0"),
    ("stackjax.tokenizer.__main__", "--special-tokens", "", "special_tokens.0 is ''"),
    ("stackjax.tokenizer.__main__", "--vocab-size", "256", "vocab_size is 256"),
    ("stackjax.train", "--skip-examples", "-1", "skip_examples is -1"),
    ("stackjax.train", "--model.num-layers", "x", "--model.num-layers: 'x' is not a whole num"),
]


UNKNOWN_SCHEMES = [
    ("stackjax.convert", "foo://b/x", "out"),
    ("stackjax.evaluate", "a", "--task-dir", "gs://b/x"),
    ("stackjax.generate", "s3://b/x"),
    ("stackjax.grow", "http://b/x", "out", "--growth", "stack(2)"),
    ("stackjax.grow", "a", "out", "--growth", "stack(2)", "--config", "gs://b/x"),
    ("stackjax.inspect", "http://b/x"),
    ("stackjax.prepare", "http://b/x", "out", "--tokenizer", "bytes"),
    ("stackjax.prepare", "a.txt", "out", "--tokenizer", "foo://b/x"),
    ("stackjax.prepare", "a.txt", "http://b/x", "--tokenizer", "bytes"),
    ("stackjax.tokenizer.__main__", "gs://b/x", "--vocab-size", "300"),
    ("stackjax.train", "--config", "configs/tiny.py", "--workdir", "foo://b/x"),
    ("stackjax.train", "--config", "gs://b/x"),
]
DISK_ONLY_OPTIONS = [
    ("scripts.bakeoff", "--output"),
    ("scripts.benchmark", "--out"),
    ("scripts.benchmark", "--profile"),
    ("scripts.peers.__main__", "--output"),
    ("scripts.performance", "--page"),
    ("scripts.scale", "--output"),
    ("stackjax.compare", "--output"),
    ("stackjax.evaluate", "--output"),
    ("stackjax.fit", "--json"),
    ("stackjax.generate", "--prompt-file"),
    ("stackjax.isoflop", "--output"),
    ("stackjax.plan", "--benchmark"),
    ("stackjax.plan", "--write"),
    ("stackjax.scale", "--output"),
    ("stackjax.tokenizer.__main__", "--output"),
]


@pytest.fixture
def error_line(run_main):
    """Runs a command with an error, and returns the printed line."""

    def call(module: str, *args: str) -> str:
        code, out, err = run_main(importlib.import_module(module).main, *args)
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        return line

    return call


@pytest.mark.parametrize("module", COMMANDS)
def test_unknown_option_is_one_line(error_line, module):
    line = error_line(module, *COMMANDS[module], "--nonsense", "5")
    assert line.startswith("error: '--nonsense 5' is not an option or a value of an option")
    assert re.search(r"; see `python -m \S+.* --help`\.$", line)


@pytest.mark.parametrize("module", COMMANDS)
def test_missing_arguments_are_one_line(error_line, module):
    line = error_line(module)
    assert re.search("must be given|no config given|must be from 1 to|give exactly one", line)


@pytest.mark.parametrize(("module", "option", "value", "message"), WRONG_VALUES)
def test_wrong_value_is_one_line(error_line, module, option, value, message):
    line = error_line(module, *COMMANDS[module], option, value)
    assert line.startswith(f"error: {message}")


def test_similar_option_is_suggested(error_line):
    line = error_line("stackjax.generate", "a", "--max_tokns=5")
    assert "'--max_tokns=5' is not an option or a value of an option (perhaps " in line
    assert "(perhaps --max-tokens is meant)" in line


def test_option_without_value_is_one_line(error_line):
    line = error_line("stackjax.generate", "a", "--seed")
    assert line.startswith("error: --seed must have a value, INT >= 0; see ")


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--config"], "no config given"), (["--config", "a.py"], "there is no such file")],
)
def test_missing_config_is_one_line(error_line, args, message):
    assert message in error_line("stackjax.train", *args)


@dataclasses.dataclass
class Broken:
    """A command with a bug."""

    number: int = 0

    def __post_init__(self):
        int("no number")


def test_bug_in_an_option_keeps_the_traceback():
    with pytest.raises(ValueError, match="invalid literal") as raised:
        parse(Broken, prog="broken", args=[])
    assert not isinstance(raised.value, UserError)


@pytest.mark.parametrize("module", ["stackjax.generate", "stackjax.train"])
def test_help_is_printed(run_main, module):
    main = importlib.import_module(module).main
    code, out, err = run_main(main, *COMMANDS[module], "--help")
    assert (code, err) == (0, "")
    assert "usage: " in out and len(out.splitlines()) > 20


@pytest.mark.parametrize("args", UNKNOWN_SCHEMES, ids=" ".join)
def test_unknown_path_scheme_is_one_line(error_line, args):
    assert re.search("://b|:/b", error_line(*args))


@pytest.mark.parametrize("url", ["gs://b/x", "foo://b/x"])
@pytest.mark.parametrize(("module", "option"), DISK_ONLY_OPTIONS)
def test_bucket_is_refused_for_disk_only_options(error_line, module, option, url):
    line = error_line(module, *COMMANDS[module], option, url)
    name = option.removeprefix("--").replace("-", "_")
    assert line.startswith(f"error: {name} is {url.replace('//', '/')!r};")
