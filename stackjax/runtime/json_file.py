"""JSON objects in the files of a run: read, checked and decoded, or named as damaged."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, TypeVar

from etils import epath

from stackjax.errors import UserError

T = TypeVar("T")
Fields = dict[str, Any]

_SEAL = "sha256"
_MAX_DIGITS = 100
"""Longer numbers are in no file of a run; Python refuses those of 4,300 digits."""


def read_object(path: epath.PathLike, way_out: str, interpret: Callable[[Fields], T]) -> T:
    """Returns what the JSON object in a file means.

    Args:
      way_out: What the user can do about a damaged file, for errors.
      interpret: Returns the meaning of the fields; UserError if they have none.

    Raises:
      UserError: The file is missing or damaged.
      OSError: The file cannot be read.
    """
    file = epath.Path(path)
    try:
        return interpret(parse_object(file.read_bytes()))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; {way_out}.") from error
    except (UserError, IsADirectoryError) as error:
        raise UserError(f"{file} is damaged: {error}; {way_out}.") from error


def parse_object(text: bytes) -> Fields:
    """Returns the JSON object that a text is; UserError if it is none.

    Numbers that are not finite, and names that occur twice, are refused as well.
    """
    try:
        found = json.loads(
            text.decode(),
            object_pairs_hook=_once,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is no UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"it is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"it is no JSON object, but {_shown(found)}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UserError("a name occurs twice in it")
    return found


def _finite(number: str) -> float:
    return float(number) if math.isfinite(float(number)) else _refuse(number)


def _whole(digits: str) -> int:
    return int(digits) if len(digits) <= _MAX_DIGITS else _refuse(f"{digits[:20]}...")


def _refuse(constant: str) -> NoReturn:
    raise UserError(f"it holds the number {constant[:60]}")


def seal(fields: Mapping[str, Any]) -> Fields:
    """Returns the fields with a hash of them, which `unseal` compares."""
    return {**fields, _SEAL: _digest(fields)}


def unseal(sealed: Any) -> Fields:
    """Returns the fields of a sealed object; UserError if they are others than were sealed."""
    fields = dict(sealed) if isinstance(sealed, Mapping) else {}
    if fields.pop(_SEAL, None) != _digest(fields):
        raise UserError("its fields do not match their hash")
    return fields


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def decode(kind: Any, value: Any, name: str) -> Any:
    """Returns the value of a type that `dataclasses.asdict` and JSON have made plain.

    Args:
      kind: A dataclass, a tuple of any length, a mapping of whole numbers, a `Literal`, a
        union, or a plain type.
      name: The name of the value, for errors.

    Raises:
      UserError: The value has another type, or a field is missing or unknown.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next((each for each in typing.get_args(kind) if _has_form(each, value)), kind)
    if not _has_form(kind, value):
        wanted = kind if typing.get_origin(kind) else kind.__name__
        raise UserError(f"{name} is {_shown(value)}, not {wanted}")
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, name)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(decode(item, each, f"{name}.{i}") for i, each in enumerate(value))
    if typing.get_origin(kind) is Mapping:
        item = typing.get_args(kind)[1]
        return {int(key): decode(item, each, f"{name}.{key}") for key, each in value.items()}
    return value


def _decode_fields(kind: Any, value: Mapping[str, Any], name: str) -> Any:
    hints = typing.get_type_hints(kind)
    required = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    if wrong := sorted((required - value.keys()) | (value.keys() - hints.keys())):
        raise UserError(f"{name}.{wrong[0]} is {'unknown' if wrong[0] in value else 'missing'}")
    return kind(
        **{key: decode(hints[key], each, f"{name}.{key}") for key, each in value.items()}
    )


def _has_form(kind: Any, value: Any) -> bool:
    """Returns whether a value may be of a type, its fields or items aside."""
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple)
    if typing.get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(key.isdecimal() for key in value)
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _shown(value: Any) -> str:
    return repr(value)[:60]
