"""A data set as text for a terminal."""

import itertools
from collections.abc import Iterator, Sequence

from stackjax.data.example_documents import Example
from stackjax.data.input_totals import InputTotals
from stackjax.data.length_counts import LengthCounts
from stackjax.data.manifest import Split
from stackjax.data.overlap import Overlap
from stackjax.data.token_lines import token_lines, visible
from stackjax.data.view import DataView
from stackjax.runtime.text_table import aligned
from stackjax.tokenizer.token_bytes import TokenBytes, token_bytes

_BAR = 24
"""Characters in the longest bar of the histogram."""
_EIGHTHS = " ▏▎▍▌▋▊▉"


def show(found: DataView, width: int, *, is_colored: bool) -> str:
    """Returns the text, in sections.

    Args:
      width: Terminal cells in a line with tokens.
      is_colored: As for `token_lines`.
    """
    sections = [_head(found), _splits(found), "\n".join(_facts(found))]
    if found.inputs is not None:
        sections.append(_inputs(found.inputs))
    if found.overlaps:
        sections.append(_overlaps(found.overlaps))
    if counts := found.lengths.get("train"):
        sections.append(f"training documents by length in tokens\n{_histogram(counts)}")
    bytes_of = token_bytes(found.tokenizer)
    sections += [_example(each, bytes_of, width, is_colored) for each in found.examples]
    return "\n\n".join(sections)


def _head(found: DataView) -> str:
    info, manifest = found.manifest.tokenizer, found.manifest
    return (
        f"{_name(found.path)}: tokenizer {_name(info.name)} ({info.digest[:12]}), vocabulary "
        f"of {info.vocab_size:,}, tokens in {manifest.dtype}, data {manifest.digest[:12]}"
    )


def _splits(found: DataView) -> str:
    head = (
        "split",
        "documents",
        "duplicates",
        "tokens",
        "tokens/document",
        "median",
        "longest",
    )
    rows = [
        (name, *_split_cells(split, found.lengths.get(name)))
        for name, split in found.manifest.splits.items()
    ]
    return aligned([head, *rows], "<>")


def _split_cells(split: Split, counts: LengthCounts | None) -> tuple[str, ...]:
    duplicates = "-" if split.hashes is None else f"{split.duplicates:,}"
    known = f"{split.documents:,}", duplicates, f"{split.tokens:,}"
    if counts is None:
        return (*known, "-", "-", "-")
    lengths = f"{counts.mean:,.1f}", f"{counts.median:,.0f}", f"{counts.longest:,}"
    return (*known, *lengths)


def _facts(found: DataView) -> Iterator[str]:
    manifest = found.manifest
    if (ratio := found.bytes_per_token) is not None:
        yield f"bytes per token: {ratio:.3f}, special tokens included"
    if all(split.hashes for split in manifest.splits.values()):
        yield f"documents in both splits: {manifest.shared_documents:,}"
    yield f"left out: {_left_out(manifest.left_out)}"


def _left_out(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} ({reason})" for reason, count in counts.items()) or "nothing"


def _inputs(inputs: InputTotals) -> str:
    head = ("documents", "bytes", "input", "left out")
    rows = [
        (
            f"{each.documents:,}",
            f"{each.bytes:,}",
            _name(each.source),
            _left_out(each.left_out) if each.left_out else "",
        )
        for each in inputs.largest
    ]
    more = inputs.files - len(rows)
    files = f"{inputs.files:,} input file{'s' * (inputs.files != 1)}"
    lines = [
        f"{files}: {inputs.documents:,} documents, {inputs.bytes:,} bytes",
        aligned([head, *rows], ">><"),
    ]
    return "\n".join(lines + ([f"and {more:,} more"] if more else []))


def _overlaps(overlaps: dict[str, Overlap]) -> str:
    head = ("shared with", "both train", "both validation", "ours in theirs", "theirs in ours")
    rows = [
        (
            _name(path),
            f"{each.train:,}",
            f"{each.validation:,}",
            f"{each.validation_in_train:,}",
            f"{each.train_in_validation:,}",
        )
        for path, each in overlaps.items()
    ]
    note = "ours in theirs: our validation documents in their training split; and vice versa"
    return f"{aligned([head, *rows], '<>')}\n{note}"


def _histogram(counts: LengthCounts) -> str:
    head = ("up to", "documents", "share", "", "share of tokens", "")
    bins = counts.octaves()
    documents = [each.documents / counts.documents for each in bins]
    tokens = [each.tokens / counts.tokens for each in bins]
    highest = max(*documents, *tokens)
    rows = [
        (
            f"{each.up_to:,}",
            f"{each.documents:,}",
            _percent(of_documents),
            _bar(of_documents / highest),
            _percent(of_tokens),
            _bar(of_tokens / highest),
        )
        for each, of_documents, of_tokens in zip(bins, documents, tokens, strict=True)
    ]
    return aligned([head, *rows], ">>><><")


def _bar(share: float) -> str:
    """Returns a bar, to an eighth of a character."""
    whole, eighths = divmod(round(8 * _BAR * share), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _example(each: Example, bytes_of: TokenBytes, width: int, is_colored: bool) -> str:
    def lines(tokens: Sequence[int]) -> list[str]:
        return token_lines(list(map(bytes_of, tokens)), width, is_colored=is_colored)

    title = f"training document {each.document:,}: {each.tokens:,} tokens"
    middle = [f"... {each.left_out:,} tokens ..."] if each.left_out else []
    return "\n".join(itertools.chain([title], lines(each.head), middle, lines(each.tail)))


def _name(path: str) -> str:
    """Returns a path without control characters."""
    return visible(path.encode(errors="surrogateescape"))
