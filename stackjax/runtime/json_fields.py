"""Dataclasses read from JSON, with every field checked against the annotation."""

import dataclasses
import types
import typing
from typing import Any

from stackjax.errors import UserError


def from_json(kind: Any, value: object, name: str = "") -> Any:
    """Returns a parsed JSON value as the annotated type.

    Annotations are dataclasses, `tuple[X, ...]`, `dict[K, X]`, literals, unions and JSON
    scalars. Every dataclass field must be present.

    Args:
      name: Dotted field name, for errors.

    Raises:
      UserError: A field is missing, unknown, or has another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _dataclass_from_json(kind, value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(
            from_json(arguments[0], item, f"{name}.{i}") for i, item in enumerate(value)
        )
    if origin is dict and isinstance(value, dict):
        return {
            from_json(arguments[0], key, f"the key {key!r:.40} of {name}"): from_json(
                arguments[1], item, _join(name, key)
            )
            for key, item in value.items()
        }
    if origin in (typing.Union, types.UnionType):
        chosen = next((each for each in arguments if _fits(each, value)), arguments[0])
        return from_json(chosen, value, name)
    if _fits(kind, value):
        return value
    raise UserError(f"{name or 'all of it'} is {value!r:.60}, which is not {_describe(kind)}")


def _dataclass_from_json(kind: Any, value: dict[str, Any], name: str) -> Any:
    kinds = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for field in fields:
        if field not in value:
            raise UserError(f"{_join(name, field)} is missing")
    for field in value:
        if field not in fields:
            raise UserError(f"{_join(name, field)[:60]} is not a known field")
    return kind(**{f: from_json(kinds[f], value[f], _join(name, f)) for f in fields})


def _fits(kind: Any, value: object) -> bool:
    """Returns whether a value has an annotated type; `True` is no integer here."""
    match typing.get_origin(kind) or kind:
        case typing.Literal:
            return isinstance(value, str) and value in typing.get_args(kind)
        case types.NoneType:
            return value is None
        case built_in if built_in in (int, float, bool, str):
            return type(value) is built_in
        case built_in if built_in in (tuple, dict):
            return isinstance(value, list if built_in is tuple else dict)
        case _:
            return dataclasses.is_dataclass(kind) and isinstance(value, dict)


def _describe(kind: Any) -> str:
    match typing.get_origin(kind) or kind:
        case typing.Literal:
            return " or ".join(map(repr, typing.get_args(kind)))
        case built_in if built_in in _NAMES:
            return _NAMES[built_in]
        case _:
            return "an object"


_NAMES = {
    int: "an integer",
    float: "a float",
    bool: "true or false",
    str: "a text",
    tuple: "a list",
    dict: "an object",
    types.NoneType: "null",
}


def _join(name: str, field: object) -> str:
    return f"{name}.{field}".lstrip(".")
