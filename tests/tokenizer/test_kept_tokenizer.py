"""Tokenizer copies in data sets, runs, checkpoints and exported folders."""

import dataclasses
import json
import shutil

import folders
import pytest
import tokenizer_kinds
import transformers
from etils import epath
from tokenizer_kinds import BOS, EOS, TURN, write_kind

from stackjax.data.config import PrepareConfig
from stackjax.data.prepare import prepare
from stackjax.data.sources import TokenSource, read_manifest
from stackjax.growth import Stack
from stackjax.inference.convert import convert
from stackjax.inference.pretrained import load_pretrained
from stackjax.inference.run_tokenizer import copy_data_tokenizer, data_tokenizer
from stackjax.inference.saved_model import SavedCheckpoint, model_of
from stackjax.interop.folder import copy_portable_files
from stackjax.options import ConvertConfig, GrowConfig
from stackjax.run import train
from stackjax.run.grow import grow
from stackjax.run.init_from import check_start, run_tokenization
from stackjax.tokenizer.special_tokens import read_tokenization

TEXTS = ["a model that grows", "while it trains", f"it quotes {EOS} and {BOS}"] * 90
KIND = "bpe_ignoring_merges"


def prepared(directory, tokenizer) -> str:
    """Prepares a data set from `TEXTS`; returns the path."""
    inputs = directory / "documents.jsonl"
    inputs.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    output = str(directory / "set")
    prepare(
        PrepareConfig(
            paths=(str(inputs), output),
            tokenizer=str(tokenizer),
            validation_fraction=0.3,
            num_processes=1,
        )
    )
    return output


def write_folder(path, begins=True):
    folder = folders.write(path, "llama", vocab_size=320, max_position_embeddings=64)
    write_kind(KIND, folder, begins)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": EOS}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return folder


def first_document_tokens(path: str) -> list[int]:
    manifest = read_manifest(path)
    stream = TokenSource(path, "train", manifest.splits["train"].tokens)[0].tolist()
    return stream[: stream.index(manifest.tokenizer.end_id)]


@pytest.mark.slow
def test_finished_run_is_usable_without_its_tokenizer_folder_and_data(world, tmp_path):
    folder = write_folder(tmp_path / "folder")
    data = prepared(tmp_path, folder / "tokenizer.json")
    config = world.config(workdir=tmp_path / "run")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=data),
        model=dataclasses.replace(model_of(str(folder)), scan_unroll=1),
        model_is="source",
        init_from=str(folder),
    )
    before = run_tokenization(config)
    train.train(config)
    document = first_document_tokens(data)
    assert document[0] == before.tokenizer.find(BOS)
    shutil.rmtree(folder)
    shutil.rmtree(data)
    grow(GrowConfig(source=config.workdir, target=str(tmp_path / "grown"), growth=Stack(2)))
    convert(ConvertConfig(source=str(tmp_path / "grown"), target=str(tmp_path / "out")))
    for path in (config.workdir, str(tmp_path / "grown"), str(tmp_path / "out")):
        found = load_pretrained(path).tokenization
        assert found[1:] == before[1:] == ((1, 2), 0)
        assert found.tokenizer.digest == before.tokenizer.digest
        text = found.tokenizer.decode(document)
        assert found.encode_prompt(text).tolist() == document
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text).input_ids == document


@pytest.mark.parametrize("kind", ["bytes", *tokenizer_kinds.KINDS])
def test_tokenizer_file_is_stored_in_the_data_set(kind, tmp_path):
    name = "bytes" if kind == "bytes" else write_kind(kind, tmp_path)
    data = prepared(tmp_path, name)
    before = data_tokenizer(data)
    if kind != "bytes":
        (tmp_path / before.file).unlink()
    shutil.move(data, tmp_path / "moved")
    after = data_tokenizer(str(tmp_path / "moved"))
    assert (after.name, after.digest, after.end_id) == (name, before.digest, before.end_id)
    copy_data_tokenizer(str(tmp_path / "moved"), epath.Path(tmp_path / "run"))
    shutil.rmtree(tmp_path / "moved")
    (tmp_path / "run" / "stage_0" / "train" / "8").mkdir(parents=True)
    kept = SavedCheckpoint(
        epath.Path(tmp_path / "run" / "stage_0" / "train" / "8"), None
    ).tokenization
    assert kept is not None
    assert kept.tokenizer.encode(TURN).tolist() == before.encode(TURN).tolist()
    assert kept.end_ids == (before.end_id,)


def test_damaged_tokenizer_copy_is_refused(tmp_path):
    data = prepared(tmp_path, write_kind(KIND, tmp_path))
    file = tmp_path / "set" / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole.replace('"z"', '"zz"', 1))
    with pytest.raises(ValueError, match="is not the tokenizer recorded in"):
        data_tokenizer(data)
    file.unlink()
    file.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="is a link to /etc/passwd, outside"):
        data_tokenizer(data)


@pytest.mark.parametrize(
    ("begins", "tokenizer", "message"),
    [
        (True, "the folder", None),
        (True, "saved again", None),
        (False, "the folder", None),
        (True, "without BOS", "begin with the tokens"),
        (True, "bytes", "has a different tokenizer"),
        (True, "another", "has a different tokenizer"),
    ],
)
def test_data_of_another_tokenizer_is_refused(begins, tokenizer, message, tmp_path):
    folder = write_folder(tmp_path / "folder", begins)
    other = tmp_path / "other"
    other.mkdir()
    if tokenizer == "saved again":
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    elif tokenizer == "without BOS":
        write_kind(KIND, other, begins=False)
    elif tokenizer == "another":
        write_kind("unigram", other)
    else:
        other = "bytes" if tokenizer == "bytes" else folder
    data, model = prepared(tmp_path, other), model_of(str(folder))
    if message is None:
        check_start(str(folder), model, data)
        return
    with pytest.raises(ValueError, match=message) as error:
        check_start(str(folder), model, data)
    assert "prepare the data again, with --tokenizer" in str(error.value)


def test_bytes_tokenizer_round_trips_through_export(uncut, world, tmp_path):
    convert(ConvertConfig(source=str(uncut), target=str(tmp_path / "out")))
    check_start(
        str(tmp_path / "out"), model_of(str(tmp_path / "out")), str(world.path / "data")
    )
    assert read_tokenization(tmp_path / "out").prefix_id == 0


def test_portable_files_are_copied_but_links_out_of_the_folder_are_refused(tmp_path):
    source, target = tmp_path / "source", epath.Path(tmp_path / "target")
    (source / "additional_chat_templates").mkdir(parents=True)
    names = [
        "tokenizer.json",
        "tokenizer.4.0.0.json",
        "tekken.json",
        "spiece.model",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE.txt",
    ]
    for name in (*names, "modeling.py", "model.safetensors"):
        (source / name).write_text(name)
    copy_portable_files(epath.Path(source), target)
    found = [path for path in tmp_path.joinpath("target").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(target)) for path in found) == sorted(names)
    (tmp_path / "secret").write_text("secret")
    (source / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link to"):
        copy_portable_files(epath.Path(source), epath.Path(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
