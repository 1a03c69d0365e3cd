"""The report of `data --config`: text and JSON."""

import dataclasses
from collections import Counter

from stackjax.analysis.run_data import RunData, SourceData, read_run_data
from stackjax.config import Config
from stackjax.data.view_config import RunDataConfig
from stackjax.files.output import check_writable, write_json
from stackjax.runtime.text_table import aligned


def run_data_report(config: Config, options: RunDataConfig) -> str:
    """Writes the JSON file of the options, and returns the text.

    Raises:
      UserError: An option or the config is wrong, or a data set is missing or damaged.
      OSError: A file cannot be read or written.
    """
    if options.json is not None:
        check_writable("--json", options.json)
    found = read_run_data(config)
    if options.json is not None:
        write_json(options.json, dataclasses.asdict(found))
    return _show(found)


def _show(found: RunData) -> str:
    tables = [_stages_table(found), _sources_table(found), _examples_table(found)]
    return "\n\n".join(tables)


def _stages_table(found: RunData) -> str:
    head = ("stage", "sequence length", "sequences", "tokens")
    rows = [
        (f"{each.stage}", f"{each.seq_len:,}", f"{each.examples:,}", f"{each.tokens:,}")
        for each in found.stages
    ]
    return aligned([head, *rows], ">")


def _sources_table(found: RunData) -> str:
    many = len(found.stages) > 1
    stages = [f"in stage {each.stage}" for each in found.stages] if many else []
    head = ["source", "tokens", "read", "epochs", *stages, "at most", "padding", "path"]
    rows = [
        [
            source.name,
            f"{source.tokens:,}",
            f"{source.tokens_read:,}",
            f"{source.epochs:.3g}",
            *(f"{each.epochs[index]:.3g}" for each in found.stages if many),
            _limit(source),
            "-" if source.padding_share is None else f"{100 * source.padding_share:.2f} %",
            source.path,
        ]
        for index, source in enumerate(found.sources)
    ]
    return aligned([head, *rows], "<" + ">" * (len(head) - 2) + "<")


def _limit(source: SourceData) -> str:
    if source.max_epochs is None:
        return "-"
    is_exceeded = source.tokens_read > source.max_epochs * source.tokens
    return f"{source.max_epochs:g}{', exceeded' * is_exceeded}"


def _examples_table(found: RunData) -> str:
    names = Counter(each.source for each in found.examples)
    shares = ", ".join(f"{count} of {name}" for name, count in names.most_common())
    head = ("example", "source", "sequence", "tokens", "begins with")
    rows = [
        (f"{each.example:,}", each.source, f"{each.sequence:,}", f"{each.seq_len:,}", each.text)
        for each in found.examples
    ]
    return f"the first examples: {shares}\n{aligned([head, *rows], '><>><')}"
