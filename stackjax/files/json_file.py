"""JSON files: strict parsing, hashes against damage, and decoding into dataclasses."""

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, TypeVar

from etils import epath

from stackjax.runtime.errors import UserError

T = TypeVar("T")
Fields = dict[str, Any]

_SEAL = "sha256"
_MAX_DIGITS = 100
"""Maximum number of digits; Python itself refuses integers above 4,300 digits."""
_INDEX = re.compile("0|[1-9][0-9]{0,8}")
_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    Mapping: "an object",
    types.NoneType: "null",
}
_MAX_SHOWN = 60
"""Maximum length of a name or value in a message."""


def read_object(path: epath.PathLike, way_out: str, interpret: Callable[[Fields], T]) -> T:
    """Returns the result of `interpret` for the JSON object in a file.

    Args:
      way_out: Remedy for a damaged file, for the error message.
      interpret: Converts the fields; raises UserError if a field is invalid.

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
    """Returns the JSON object in a text.

    Raises:
      UserError: The text is not a JSON object, repeats a name, or has NaN or infinity.
    """
    try:
        found = json.loads(
            text.decode(),
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"it is {_shorten(found)}, not a JSON object")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UserError("it has the same name twice")
    return found


def _finite(number: str) -> float:
    return float(number) if math.isfinite(float(number)) else _refuse(number)


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= _MAX_DIGITS else _refuse(f"{digits[:20]}...")


def _refuse(constant: str) -> NoReturn:
    raise UserError(f"it has the number {constant[:60]}")


def seal(fields: Mapping[str, Any], name: str = _SEAL) -> Fields:
    """Returns the fields as plain JSON values, with a hash for `unseal`.

    Args:
      name: Name of the field for the hash.
    """
    plain = json.loads(json.dumps(fields))
    return {**plain, name: hash_of(plain)}


def unseal(sealed: Any, name: str = _SEAL) -> Fields:
    """Returns the fields of a sealed object, without the hash; UserError for a wrong hash."""
    fields = dict(sealed) if isinstance(sealed, Mapping) else {}
    if fields.pop(name, None) != hash_of(fields):
        raise UserError("its fields do not match their hash")
    return fields


def unseal_if_sealed(fields: Fields) -> Fields:
    """Returns the fields of an object, after checking the hash if there is one."""
    return unseal(fields) if _SEAL in fields else fields


def hash_of(value: Any) -> str:
    """Returns the SHA-256 of a JSON value; the order of keys has no effect."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def decode(kind: Any, value: Any, name: str = "") -> Any:
    """Returns a typed value from plain JSON values, the inverse of `dataclasses.asdict`.

    Args:
      kind: A dataclass, a tuple of any length, a mapping, a `Literal`, a union, or a scalar.
        Fields with a default may be absent.
      name: Dotted name of the value, for the error message.

    Raises:
      UserError: The value has a wrong type, or a field is missing or unknown.
    """
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        chosen = next((each for each in arguments if _has_json_type(each, value)), arguments[0])
        return decode(chosen, value, name)
    if not _has_json_type(kind, value):
        raise UserError(f"{name or 'it'} is {_shorten(value)}, which is not {_describe(kind)}")
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, name)
    if _json_type(kind) is list:
        item = arguments[0]
        return tuple(decode(item, each, dotted(name, str(i))) for i, each in enumerate(value))
    if _json_type(kind) is Mapping and arguments:
        return {
            _decode_key(arguments[0], key, name): decode(arguments[1], each, dotted(name, key))
            for key, each in value.items()
        }
    return value


def _decode_fields(kind: Any, value: Mapping[str, Any], name: str) -> Any:
    hints, required = _fields(kind)
    for field in required:
        if field not in value:
            raise UserError(f"{dotted(name, field)} is missing")
    for field in value:
        if field not in hints:
            raise UserError(f"{dotted(name, field)} is not a known field")
    return kind(
        **{
            field: decode(hints[field], each, dotted(name, field))
            for field, each in value.items()
        }
    )


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the field types of a dataclass, and the names of required fields."""
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    return typing.get_type_hints(kind), required


def _decode_key(kind: Any, key: str, name: str) -> Any:
    """Returns a JSON name as a mapping key of type `kind`."""
    found = int(key) if kind is int and _INDEX.fullmatch(key) else key
    return decode(kind, found, f"the key {_shorten(key)} of {name}")


def _json_type(kind: Any) -> Any:
    """Returns the JSON form for a type: list, Mapping or a scalar type."""
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind) or origin in (dict, Mapping):
        return Mapping
    return list if origin is tuple else origin


def _has_json_type(kind: Any, value: Any) -> bool:
    """Returns whether a value has the JSON form for a type, without checks of its items."""
    form = _json_type(kind)
    if form is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if form is Mapping:
        return isinstance(value, Mapping)
    if form is list:
        return isinstance(value, list | tuple)
    if form is float:
        return type(value) in (int, float)
    return type(value) is form  # `True` is not an integer here.


def _describe(kind: Any) -> str:
    form = _json_type(kind)
    if form is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return _NAMES[form]


def dotted(name: str, field: str) -> str:
    """Returns the dotted name of a field, shortened to a single line."""
    shown = field if field.isprintable() and len(field) <= _MAX_SHOWN else _shorten(field)
    return f"{name}.{shown}".removeprefix(".")


def _shorten(value: Any) -> str:
    return repr(value)[:_MAX_SHOWN]
