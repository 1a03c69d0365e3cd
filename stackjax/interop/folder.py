"""What a folder holds beside its weights: tokenizer, lineage and model card."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
import sentencepiece
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
from etils import epath

from stackjax.data.staging import refuse_existing
from stackjax.data.tokenizer import Tokenization, Tokenizer, load_tokenizer
from stackjax.errors import UserError
from stackjax.flops import flops_6nd, num_params
from stackjax.interop.config_json import CONFIG, read_json
from stackjax.interop.huggingface import Folder
from stackjax.interop.tensors import TensorInfo, write_tensors
from stackjax.lineage import Generation, from_json, total
from stackjax.model import ModelConfig
from stackjax.phase import Counts
from stackjax.quantity import short
from stackjax.runtime.json_file import read_object
from stackjax.runtime.paths import file_inside
from stackjax.storage import is_remote

ORIGIN = "stackjax.json"
"""The file that says where the model of a folder comes from."""
CARRIED = "huggingface"
"""Where a checkpoint keeps the files of the folder that its model comes from."""
_END = "<|endoftext|>"
"""How byte 0, which ends documents, is written where bytes go out as a tokenizer."""
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def new_folder(path: str) -> epath.Path:
    """Returns where a folder is to be written.

    Raises:
      UserError: It lies in a bucket.
      FileExistsError: There is something.
    """
    if is_remote(path):
        raise UserError(f"{path}: folders of transformers are written to disks only.")
    refuse_existing(epath.Path(path))
    return epath.Path(path)


def carry(source: epath.Path, target: epath.Path) -> None:
    """Copies the files of a folder that hold no weights and stay true of a grown model."""
    target.mkdir(exist_ok=True)
    for path in (path for pattern in _TOKENIZERS for path in source.glob(pattern)):
        path.copy(target / path.name, overwrite=True)


def folder_tokenization(path: Path) -> Tokenization:
    """Returns how the model of a folder reads texts.

    Raises:
      UserError: There is none, or it cannot be read.
    """
    files = [path / name for name in ("tokenizer.json", "tokenizer.model")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(
            f"{path} has no tokenizer.json and no tokenizer.model; name one with --tokenizer."
        )
    settings = _read_if_there(path / "tokenizer_config.json")
    end = _written(settings.get("eos_token"))
    for name in ("generation_config.json", CONFIG) if end is None else ():
        ids = _read_if_there(path / name).get("eos_token_id")
        end = ids[0] if isinstance(ids, list) else ids
        if end is not None:
            break
    tokenizer = load_tokenizer(str(file), end)
    begin = _written(settings.get("bos_token"))
    prefix_id = None if begin is None else tokenizer.find(begin)
    if prefix_id is None:
        return Tokenization(tokenizer, tokenizer.end_id, is_prefixed=False)
    if file.suffix == ".model":
        is_prefixed = settings.get("add_bos_token", True)
    else:
        own = tokenizers.Tokenizer.from_file(str(file)).encode("a").ids
        is_prefixed = own[:1] == [prefix_id]
    return Tokenization(tokenizer, prefix_id, is_prefixed)


def _read_if_there(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}


def _written(token: Any) -> str | None:
    """Returns a token as it is written; older folders also say how it is cut out of text."""
    return token["content"] if isinstance(token, dict) else token


def write_tokenizer(tokenizer: Tokenizer, target: Path) -> None:
    """Writes a tokenizer as transformers reads it."""
    if tokenizer.name == "bytes":
        model = _bytes_model()
        model.save(str(target / "tokenizer.json"))
    elif tokenizer.name.endswith(".model"):
        shutil.copyfile(tokenizer.name, target / "tokenizer.model")
        pieces = sentencepiece.SentencePieceProcessor(tokenizer.name)
        first = pieces.IdToPiece(int(tokenizer.encode("a")[0]))
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            # Not every model was trained to see a text begin like a word after another.
            "add_prefix_space": first.startswith("\N{LOWER ONE EIGHTH BLOCK}"),
        }
        (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        return
    else:
        shutil.copyfile(tokenizer.name, target / "tokenizer.json")
        model = tokenizers.Tokenizer.from_file(tokenizer.name)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": model.id_to_token(tokenizer.end_id),
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _bytes_model() -> tokenizers.Tokenizer:
    """Returns UTF-8 bytes as tokens; byte 0, which ends documents, is a special token."""
    # Bytes that are no printable characters are written as others, in the order of bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    vocabulary = {letter: byte for byte, letter in enumerate([_END, *letters[1:]])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([_END])
    return model


def read_lineage(folder: Folder, tokens: int = 0) -> tuple[Generation, ...]:
    """Returns where the model of a folder comes from.

    Args:
      tokens: What it was trained on, where the folder does not say; 6 N FLOPs each.

    Raises:
      UserError: The folder tells of another model.
    """
    file = folder.path / ORIGIN
    if not file.exists():
        flops = tokens * flops_6nd(folder.model)
        return (
            Generation(
                stage=0,
                name="train",
                growth=None,
                model=folder.model,
                spent=Counts(tokens=tokens, flops_6nd=flops, flops=flops),
                code=f"from {folder.name}",
            ),
        )
    file = file_inside(folder.path, ORIGIN, str(folder.path))
    lineage = read_object(file, "remove it", lambda fields: from_json(fields.get("lineage")))
    if num_params(lineage[-1].model) != num_params(folder.model):
        raise UserError(f"{file} tells of another model than {CONFIG}; remove it.")
    return lineage


def write_folder(
    staging: Path,
    fields: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[np.ndarray],
    lineage: Sequence[Generation],
) -> None:
    """Writes config, weights, lineage and model card into a folder.

    Args:
      infos: What the folder is to hold.
      tensors: As `write_tensors` takes them.
    """
    write_tensors(staging, infos, _show_progress(infos, tensors))
    (staging / CONFIG).write_text(json.dumps(dict(fields), indent=2) + "\n")
    origin = {"lineage": [dataclasses.asdict(generation) for generation in lineage]}
    (staging / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
    (staging / "README.md").write_text(_card(lineage))


def _show_progress(
    infos: Mapping[str, TensorInfo], tensors: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """Returns the tensors, while a terminal shows how many bytes of them are written."""
    columns = (
        *rich.progress.Progress.get_default_columns(),
        rich.progress.DownloadColumn(),
    )
    with rich.progress.Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("writing", total=sum(info.num_bytes for info in infos.values()))
        for tensor in tensors:
            yield tensor
            bar.advance(task, tensor.nbytes)
            del tensor  # before the next one is made


def _card(lineage: Sequence[Generation]) -> str:
    """Returns a model card: what the model is, where it comes from, what it has cost."""
    model, spent = lineage[-1].model, total(lineage)
    rows = "\n".join(_row(i, generation) for i, generation in enumerate(lineage))
    unknown = ""
    if not lineage[0].spent.tokens:
        unknown = (
            "\nOn how many tokens the first model was trained is not known here, so they and "
            "their FLOPs are not in the sums.\n"
        )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- model-growth
- stackjax
---

# A model of {short(num_params(model))} parameters, grown with stackjax

{_sizes(model)}, a vocabulary of {model.vocab_size:,}.

| | growth | layers | channels | parameters | tokens | FLOPs (6ND) | code |
|---|---|---|---|---|---|---|---|
{rows}
| **total** | | | | | **{short(spent.tokens)}** | **{spent.flops_6nd:.3e}** | |
{unknown}
FLOPs are 6 x parameters x tokens, those of every smaller model on the way included.
`{ORIGIN}` has the same for machines.
"""


def _row(index: int, generation: Generation) -> str:
    model, spent = generation.model, generation.spent
    growth = "" if generation.growth is None else f"`{generation.growth}`"
    cells = (
        str(index),
        growth,
        str(model.num_layers),
        str(model.embed_dim),
        short(num_params(model)),
        short(spent.tokens),
        f"{spent.flops_6nd:.3e}",
        generation.code,
    )
    return f"| {' | '.join(cells)} |"


def _sizes(model: ModelConfig) -> str:
    return (
        f"{model.num_layers} layers of {model.embed_dim} channels, {model.num_heads} query "
        f"and {model.num_kv_heads} key/value heads of {model.head_dim}, {model.mlp_dim} "
        f"hidden units"
    )
