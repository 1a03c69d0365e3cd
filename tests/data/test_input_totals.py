"""Totals over input files, in flat memory."""

import tracemalloc

import pytest

from stackjax.data.counts import InputCounts, write_inputs
from stackjax.data.input_totals import InputTotals, total_inputs
from stackjax.data.manifest import Manifest, Split, write_manifest
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer_info import TokenizerInfo


def write(path, sizes: list[int]) -> list[InputCounts]:
    """Writes a data set without tokens, with counts of some files."""
    path.mkdir()
    counts = [
        InputCounts(source=f"part-{i:06}.jsonl", documents=i % 3, bytes=size, left_out={})
        for i, size in enumerate(sizes)
    ]
    inputs, _ = write_inputs(path, counts)
    empty = Split(tokens=0, documents=0, shards=())
    info = TokenizerInfo(name="bytes", digest="0", vocab_size=256, end_id=0)
    manifest = Manifest(tokenizer=info, dtype="uint16", splits={"train": empty}, inputs=inputs)
    write_manifest(str(path), manifest)
    return counts


@pytest.mark.parametrize("num_largest", [1, 4, 50])
def test_totals_and_largest_are_those_of_the_files(tmp_path, num_largest):
    counts = write(tmp_path / "set", [i * 7919 % 10 for i in range(30)])
    assert total_inputs(str(tmp_path / "set"), num_largest) == InputTotals(
        files=30,
        documents=sum(each.documents for each in counts),
        bytes=sum(each.bytes for each in counts),
        # Equal sizes are in the order of the inputs.
        largest=tuple(sorted(counts, key=lambda each: -each.bytes)[:num_largest]),
    )


def test_many_files_take_little_memory(tmp_path):
    write(tmp_path / "set", list(range(20_000)))
    tracemalloc.start()
    found = total_inputs(str(tmp_path / "set"), 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.files == 20_000
    assert [each.bytes for each in found.largest] == list(range(19_999, 19_989, -1))
    assert peak < 300_000


def test_other_counts_are_refused(tmp_path):
    write(tmp_path / "set", [1, 2, 3])
    file = tmp_path / "set" / "inputs.jsonl"
    file.write_text(file.read_text().replace('"bytes": 3', '"bytes": 4'))
    with pytest.raises(UserError, match=r"inputs.jsonl' has other counts than in the manifest"):
        total_inputs(str(tmp_path / "set"), 3)
