"""Files in a Hugging Face folder other than weights: tokenizer, lineage and model card."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from stackjax.checkpoint.lineage import Generation, from_json, total
from stackjax.files.json_file import read_object
from stackjax.files.paths import file_inside
from stackjax.files.staging import refuse_existing
from stackjax.files.storage import is_remote
from stackjax.interop.config_json import CONFIG
from stackjax.interop.huggingface import Folder
from stackjax.interop.tensors import TensorInfo, write_tensors
from stackjax.model import ModelConfig
from stackjax.model.flops import active, flops_6nd, num_params, units
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short
from stackjax.runtime.progress_bar import progress_bar
from stackjax.tokenizer.tokenizer import Tokenizer
from stackjax.tokenizer.tokenizer_info import write_file
from stackjax.tokenizer.tokenizer_json import bytes_fields
from stackjax.training.phase import Counts

LINEAGE_FILE = "stackjax.json"
"""File with the model's lineage."""
HUGGINGFACE_DIR = "huggingface"
"""Directory next to a checkpoint with the original folder's files."""
_PORTABLE = (
    "tokenizer.json",
    "tokenizer.*.json",  # for other versions of transformers
    "tokenizer.model",
    "tokenizer.model.*",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files still valid for a grown model: tokenizer, chat templates and licenses."""


def new_folder(path: str) -> epath.Path:
    """Returns the path for a new folder.

    Raises:
      UserError: The path is in a bucket.
      FileExistsError: The path is not empty.
    """
    if is_remote(path):
        raise UserError(f"{path}: Hugging Face folders can only be written to a disk.")
    refuse_existing(epath.Path(path))
    return epath.Path(path)


def portable_files(source: epath.Path) -> list[str]:
    """Returns the names of all files still valid for a grown model.

    Raises:
      UserError: A file is a link out of the folder, possibly to a private file.
    """
    found = sorted({path for pattern in _PORTABLE for path in source.glob(pattern)})
    names = [str(path.relative_to(source)) for path in found]
    for name in names:
        file_inside(source, name, f"the folder {source}")
    return names


def copy_portable_files(source: epath.Path, target: epath.Path) -> None:
    """Copies the files still valid for a grown model.

    Raises:
      UserError: As in `portable_files`.
    """
    for name in portable_files(source):
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (source / name).copy(file, overwrite=True)
    target.mkdir(exist_ok=True)


def write_tokenizer(tokenizer: Tokenizer, target: Path) -> None:
    """Writes a tokenizer for transformers, with the special tokens used in training."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": next(map(tokenizer.written, tokenizer.begin_ids), None),
        "eos_token": tokenizer.written(tokenizer.end_id),
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.file is None:
        text = json.dumps(bytes_fields(), ensure_ascii=False)
        (target / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        write_file(tokenizer, epath.Path(target))
    if tokenizer.file == "tokenizer.model":
        first = tokenizer.written(int(tokenizer.encode("a")[0]))
        settings |= {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": bool(tokenizer.begin_ids),
            # Some models were trained without a space before the first word.
            "add_prefix_space": first.startswith("\N{LOWER ONE EIGHTH BLOCK}"),
        }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def read_lineage(folder: Folder, tokens: int = 0) -> tuple[Generation, ...]:
    """Returns the lineage for a folder's model.

    Args:
      tokens: Training tokens, at 6N FLOPs each, for a folder without lineage.

    Raises:
      UserError: The recorded lineage belongs to another model.
    """
    file = folder.path / LINEAGE_FILE
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
    file = file_inside(folder.path, LINEAGE_FILE, str(folder.path))
    lineage = read_object(file, "remove it", lambda fields: from_json(fields.get("lineage")))
    if num_params(lineage[-1].model) != num_params(folder.model):
        raise UserError(f"{file} describes another model than {CONFIG}; remove this file.")
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
      infos: Shape and type of every tensor.
      tensors: Values for `write_tensors`.
    """
    write_tensors(staging, infos, _show_progress(infos, tensors))
    (staging / CONFIG).write_text(json.dumps(dict(fields), indent=2) + "\n")
    origin = {"lineage": [dataclasses.asdict(generation) for generation in lineage]}
    (staging / LINEAGE_FILE).write_text(json.dumps(origin, indent=2) + "\n")
    (staging / "README.md").write_text(_card(lineage))


def _show_progress(
    infos: Mapping[str, TensorInfo], tensors: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the tensors and shows a progress bar in bytes."""
    total = sum(info.num_bytes for info in infos.values())
    with progress_bar("writing", total, in_bytes=True) as advance:
        for tensor in tensors:
            yield tensor
            advance(tensor.nbytes)
            del tensor  # free memory before the next tensor


def _card(lineage: Sequence[Generation]) -> str:
    """Returns a model card with the model's sizes, lineage and training cost."""
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

# A model of {short(num_params(model))} parameters{active(model)}, grown with stackjax

{_sizes(model)}, a vocabulary of {model.vocab_size:,}.

| | growth | layers | channels | parameters | tokens | FLOPs (6ND) | code |
|---|---|---|---|---|---|---|---|
{rows}
| **total** | | | | | **{short(spent.tokens)}** | **{spent.flops_6nd:.3e}** | |
{unknown}
FLOPs are 6 x active parameters x tokens, those of every smaller model on the way included.
`{LINEAGE_FILE}` has the same for machines.
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
        f"and {model.num_kv_heads} key/value heads of {model.head_dim}, "
        f"{units(model)}"
    )
