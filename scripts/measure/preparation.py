"""Speed of `prepare`, compared with its tokenizer alone."""

import contextlib
import dataclasses
import io
import json
import resource
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tokenizers

from scripts.measure.result import median
from stackjax.data.config import PrepareConfig
from stackjax.data.corpora.stdlib import list_documents
from stackjax.data.prepare import prepare
from stackjax.tokenizer.train_bpe import train_bpe

VOCAB_SIZE = 32_768
END_TOKEN = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """The built-in corpus, several times, to token shards with a BPE tokenizer."""

    text_bytes: int
    """Size of all texts."""
    prepare_seconds: float
    """From JSON lines to a data set on disk, with a process per core."""
    encode_batch_seconds: float
    """`encode_batch` of the library `tokenizers` on the same texts, with all cores."""
    speed: float
    """Median over the turns: the second time divided by the first."""
    cpu_speed: float
    """The same in seconds of CPU time, over all processes."""


class Times(NamedTuple):
    """Duration of a call."""

    seconds: float
    cpu_seconds: float
    """Of all threads, and of child processes."""


def measure_preparation(num_copies: int, num_turns: int) -> Preparation:
    """Returns the speed of preparation and of the tokenizer, which take turns.

    Args:
      num_copies: How often the texts are repeated.
    """
    texts = [text for _, text in list_documents(Path(sysconfig.get_path("stdlib")))]
    definition = train_bpe(texts, VOCAB_SIZE, (END_TOKEN,))
    library = tokenizers.Tokenizer.from_str(definition)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "tokenizer.json").write_text(definition)
        with open(directory / "texts.jsonl", "w") as file:
            for text in texts * num_copies:
                file.write(json.dumps({"text": text}) + "\n")
        turns = [
            (
                _times(lambda turn=turn: _prepare(directory, directory / f"set_{turn}")),
                _times(lambda: [library.encode_batch(texts) for _ in range(num_copies)]),
            )
            for turn in range(num_turns)
        ]
    return Preparation(
        text_bytes=num_copies * sum(len(text.encode()) for text in texts),
        prepare_seconds=median([ours.seconds for ours, _ in turns]),
        encode_batch_seconds=median([library.seconds for _, library in turns]),
        speed=median([library.seconds / ours.seconds for ours, library in turns]),
        cpu_speed=median([library.cpu_seconds / ours.cpu_seconds for ours, library in turns]),
    )


def _prepare(directory: Path, output: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(
            PrepareConfig(
                paths=(str(directory / "texts.jsonl"), str(output)),
                tokenizer=str(directory / "tokenizer.json"),
            )
        )


def _times(call: Callable[[], object]) -> Times:
    start, start_cpu = time.perf_counter(), _cpu_seconds()
    call()
    return Times(time.perf_counter() - start, _cpu_seconds() - start_cpu)


def _cpu_seconds() -> float:
    usages = [
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
