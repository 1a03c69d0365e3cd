"""The built-in corpus: sorted source files, split by path, without TensorFlow."""

import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from stackjax.data.corpora import stdlib

FILES = {
    "abc.py": "import b\n",
    "json/decoder.py": "x = 1\n",
    "json/tests/test_a.py": "left out",
    "test/test_b.py": "left out",
    "idlelib/idle_test/c.py": "left out",
    "site-packages/d.py": "left out",
    "lib2to3/notes.txt": "left out",
    "empty.py": " \n",
}


@pytest.fixture
def root(tmp_path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    return tmp_path


def test_documents_are_source_files_without_tests(root):
    documents = list(stdlib.list_documents(root))
    assert documents == [("abc.py", "import b\n"), ("json/decoder.py", "x = 1\n")]


def test_missing_library_has_no_documents(tmp_path):
    assert list(stdlib.list_documents(tmp_path / "absent")) == []


def test_about_three_percent_of_paths_are_held_out():
    held_out = sum(stdlib.is_held_out(f"module_{i}.py") for i in range(10_000))
    assert 250 < held_out < 350


BUILD = """
import sys
from stackjax.data.corpora import stdlib
stdlib.build(sys.argv[1])
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> str:
    """Builds the corpus in a separate process, with visible warnings."""
    path = str(tmp_path_factory.mktemp("tfds"))
    command = [sys.executable, "-W", "default", "-c", BUILD, path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert "Warning" not in run.stderr and "Traceback" not in run.stderr
    return path


def test_dataset_is_readable_as_a_data_source(built):
    paths = {}
    for split in ("train", "validation"):
        source = tfds.data_source("stackjax_stdlib", split=split, data_dir=built)
        rows = [source[index] for index in range(len(source))]
        paths[split] = [row["path"].decode() for row in rows]
        assert all(row["text"].decode("utf-8").strip() for row in rows)
        assert paths[split] == sorted(paths[split])
    assert all(map(stdlib.is_held_out, paths["validation"]))
    assert not any(map(stdlib.is_held_out, paths["train"]))
    assert {"abc.py", "json/decoder.py"} < {*paths["train"], *paths["validation"]}
    assert not any("test" in path.split("/") for path in paths["train"])
    assert 0.01 < len(paths["validation"]) / len(paths["train"]) < 0.06
