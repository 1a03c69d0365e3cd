"""The tokenizer and special tokens of a Hugging Face folder.

The result matches `AutoTokenizer.from_pretrained` and `generate` in transformers. Special
tokens may be declared in the vocabulary, tokenizer_config.json, special_tokens_map.json,
generation_config.json and config.json.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stackjax.files.paths import file_inside
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenization import Tokenization, tokenization
from stackjax.tokenizer.tokenizer import END_TOKENS, Tokenizer, load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Vocabulary files; the first existing file is used."""
_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA = "additional_special_tokens"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
_QWEN = {"eos_token": "<|endoftext|>"}
_DEFAULTS = {
    "LlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "Qwen2Tokenizer": _QWEN,
}
"""Default special tokens by tokenizer class in transformers."""


def read_tokenization(path: Path) -> Tokenization | None:
    """Returns the tokenization in a Hugging Face folder; None without a tokenizer.

    Raises:
      UserError: A file is damaged, is a link out of the folder, or has an unknown id.
    """
    files = [Path(file_inside(path, name, "transformers")) for name in TOKENIZER_FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    settings, config = _read(path, "tokenizer_config.json"), _read(path, "config.json")
    _check_split(path, settings)
    named, stop_ids = _named(path, settings), _stop_ids(path, config)
    end = named.get("eos_token") or next(iter(stop_ids), None)
    load = _loader(path, file, settings, named, stop_ids)
    tokenizer = load(end)
    named = {**_defaults(settings, config, tokenizer), **named}
    bos_id, eos_id = (_id(tokenizer, named.get(name)) for name in ("bos_token", "eos_token"))
    end_ids = tuple(dict.fromkeys((tokenizer.end_id if eos_id is None else eos_id, *stop_ids)))
    _check_ids(path, tokenizer, end_ids)
    end_id = _separator(tokenizer, end_ids)
    if end_id != tokenizer.end_id:
        tokenizer = load(end_id)
    if file.suffix == ".model":
        _check_found(file, named, bos_id)
        # In a tokenizer.json the template has these ids.
        tokenizer = dataclasses.replace(
            tokenizer,
            begin_ids=(bos_id,) * (bos_id is not None and _flag(settings, "add_bos_token")),
            suffix_ids=end_ids[:1] * _flag(settings, "add_eos_token"),
        )
    return Tokenization(tokenizer, end_ids, end_ids[0] if bos_id is None else bos_id)


def read_tokenizer(name: str, end_token: str | None = None) -> Tokenizer:
    """Returns the tokenizer with this name: `bytes`, a file, or a Hugging Face folder.

    Args:
      end_token: Replaces the default token at the end of documents.

    Raises:
      UserError: The file is damaged or lacks the end token.
    """
    return tokenization_by_name(name, end_token).tokenizer


def tokenization_by_name(name: str, end_token: str | None = None) -> Tokenization:
    """Returns the tokenization for a tokenizer name; arguments as for `read_tokenizer`."""
    if not Path(name).is_dir():
        return tokenization(load_tokenizer(name, end_token))
    found = read_tokenization(Path(name))
    if found is None:
        raise UserError(
            f"tokenizer {name!r} is a folder with neither {' nor '.join(TOKENIZER_FILES)}."
        )
    if end_token is None:
        return found
    path, file = Path(name), Path(found.tokenizer.name)
    settings = _read(path, "tokenizer_config.json")
    load = _loader(path, file, settings, _named(path, settings), found.end_ids)
    loaded = load(end_token)
    affixes = {
        "begin_ids": found.tokenizer.begin_ids,
        "suffix_ids": found.tokenizer.suffix_ids,
    }
    end_ids = tuple(dict.fromkeys((loaded.end_id, *found.end_ids)))
    return found._replace(tokenizer=dataclasses.replace(loaded, **affixes), end_ids=end_ids)


def _separator(tokenizer: Tokenizer, end_ids: Sequence[int]) -> int:
    """Returns the token between documents: the first of `END_TOKENS` among the end ids.

    In chat models the EOS is often the end-of-turn token instead.
    """
    usual = {tokenizer.find(token): i for i, token in reversed(list(enumerate(END_TOKENS)))}
    return min(end_ids, key=lambda index: usual.get(index, len(END_TOKENS)))


def _read(path: Path, name: str) -> Mapping[str, Any]:
    """Returns the JSON object in a file; empty without the file."""
    file = Path(file_inside(path, name, "transformers"))
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object; download it again.")
    return fields


def _named(path: Path, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns the named special tokens in a folder, such as `eos_token`.

    special_tokens_map.json takes precedence over tokenizer_config.json, unless the latter has
    `added_tokens_decoder`.
    """
    fields = {name: settings[name] for name in _NAMES if name in settings}
    if "added_tokens_decoder" not in settings:
        of_map = _read(path, "special_tokens_map.json")
        fields |= {name: of_map[name] for name in _NAMES if name in of_map}
    return {name: _written(path, name, token) for name, token in fields.items()}


def _loader(
    path: Path,
    file: Path,
    settings: Mapping[str, Any],
    named: Mapping[str, str | None],
    stop_ids: Sequence[int],
) -> Callable[[str | int | None], Tokenizer]:
    """Returns a function from an end token to the folder's tokenizer."""
    special, added = _special(file, named, stop_ids), _added(path, settings, named)
    return functools.partial(load_tokenizer, str(file), special=special, added=added)


def _special(
    file: Path, named: Mapping[str, str | None], stop_ids: Sequence[int]
) -> list[str | int]:
    """Returns the BOS, EOS and stop tokens, to keep out of encoded documents."""
    names = {**(_LLAMA if file.suffix == ".model" else {}), **named}
    found = (names.get(name) for name in ("bos_token", "eos_token"))
    return [*filter(None, found), *stop_ids]


def _added(
    path: Path, settings: Mapping[str, Any], named: Mapping[str, str | None]
) -> list[str]:
    """Returns the declared special tokens, in the order of transformers."""
    decoder = _entries(path, settings, "added_tokens_decoder")
    extra = "extra_special_tokens" if "extra_special_tokens" in settings else _EXTRA
    tokens = [*decoder, *filter(None, named.values()), *_entries(path, settings, extra)]
    return list(dict.fromkeys(tokens))


def _entries(path: Path, settings: Mapping[str, Any], name: str) -> list[str]:
    """Returns the token names in a list or an object, ordered by id."""
    entries = settings.get(name) or []
    if not isinstance(entries, list | dict):
        raise UserError(f"{path}: {name} is {entries!r:.80}; it must be a list or an object.")
    if isinstance(entries, dict):
        keys = sorted(entries, key=lambda key: int(key) if key.isdecimal() else len(entries))
        entries = [entries[key] for key in keys]
    return list(filter(None, (_written(path, name, token) for token in entries)))


def _check_split(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError if the tokenizer splits special tokens in prompts."""
    if _flag(settings, "split_special_tokens"):
        raise UserError(
            f"{path}: split_special_tokens is true, which stackjax does not support; set it "
            f"to false."
        )


def _check_found(file: Path, named: Mapping[str, str | None], bos_id: int | None) -> None:
    """Raises UserError if the vocabulary lacks the BOS token."""
    if named.get("bos_token") is not None and bos_id is None:
        raise UserError(
            f"{file} has no token {named['bos_token']!r}, the bos_token; save the tokenizer as "
            f"{TOKENIZER_FILES[0]}, with all of its tokens."
        )


def _written(path: Path, name: str, token: Any) -> str | None:
    """Returns a token's name; some files store an object with name and flags."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is None and token is None:
        return None
    if not isinstance(content, str) or not content:
        raise UserError(f"{path}: {name} is {token!r}; it must be the name of a token.")
    return content


def _defaults(
    settings: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer
) -> Mapping[str, str | None]:
    """Returns the default special tokens for the folder's tokenizer class."""
    if tokenizer.file == "tokenizer.model":
        return _LLAMA
    kind = config.get("model_type")
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if kind == "qwen2" or (kind == "qwen3" and name is None):
        return _QWEN
    name = str(name).removesuffix("Fast")
    # Llama 3 folders declare the class of Llama 2, and transformers ignores the declaration.
    is_other = name == "LlamaTokenizer" and b'"ByteLevel"' in (tokenizer.definition or b"")
    return {} if kind == "mistral" or is_other else _DEFAULTS.get(name, {})


def _stop_ids(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids that end a text in `generate` of transformers."""
    for name, fields in (
        ("generation_config.json", _read(path, "generation_config.json")),
        ("config.json", config),
    ):
        ids = fields.get("eos_token_id")
        if ids is None or ids == []:
            continue
        found = ids if isinstance(ids, list) else [ids]
        if not all(type(index) is int for index in found):
            raise UserError(
                f"{path / name}: eos_token_id is {ids!r}; it must be an id or a list of ids."
            )
        return tuple(found)
    return ()


def _check_ids(path: Path, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
    for index in end_ids:
        if not 0 <= index < tokenizer.vocab_size:
            raise UserError(
                f"{path}: eos_token_id is {index}, and the tokenizer has the ids 0 to "
                f"{tokenizer.vocab_size - 1}."
            )


def _id(tokenizer: Tokenizer, token: str | None) -> int | None:
    return None if token is None else tokenizer.find(token)


def _flag(settings: Mapping[str, Any], name: str) -> bool:
    return settings.get(name) is True
