"""Validation of dataclass fields by their annotations: type, range, and conditions.

    batch_size: Annotated[int, Whole(at_least=1)]
    decay_tokens: Annotated[Count | None, OnlyWith(shape="wsd")] = None

`check_fields` reads the annotations. `--help` shows the range of each number.
"""

import dataclasses
import functools
import inspect
import operator
import re
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import Length, Range, show

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_Alternative = tuple[Any, tuple["Range | Length", ...]]


class Checked:
    """Base class for dataclasses; construction checks the fields."""

    def __post_init__(self):
        check_fields(self)


class OnlyWith:
    """A rule for a field without effect unless another field is set.

    `OnlyWith("path")` needs a true value in `path`. `OnlyWith(shape="wsd")` needs this value,
    and `OnlyWith(shape=("wsd", "cosine"))` either value. Any match among several conditions
    is enough.
    """

    def __init__(self, *names: str, **values: Any):
        self.needs = {name: None for name in names} | {
            name: value if isinstance(value, tuple) else (value,)
            for name, value in values.items()
        }

    def holds(self, owner: Any) -> bool:
        """Returns whether the field has an effect in this dataclass instance."""
        return any(
            bool(operator.attrgetter(name)(owner))
            if values is None
            else operator.attrgetter(name)(owner) in values
            for name, values in self.needs.items()
        )

    def reason(self, owner: Any, path: str) -> str:
        """Returns the reason why the field has no effect, and the way out."""
        named = {join(path, name): operator.attrgetter(name)(owner) for name in self.needs}
        are = " and ".join(f"{name} is {show(value)}" for name, value in named.items())
        (name, values), *_ = self.needs.items()
        to = "" if values is None else f" to {' or '.join(map(repr, values))}"
        return f"which has no effect while {are}; leave it out, or set {join(path, name)}{to}."


def check_fields(value: Any, path: str = "") -> None:
    """Raises UserError for a field with a wrong value, also in nested dataclasses.

    Integers in float fields become floats.

    Args:
      path: Dotted name of the dataclass on the command line; empty for the root.
    """
    fields = _fields(type(value))
    for field, hint in fields:
        item = getattr(value, field.name)
        _check(item, hint, join(path, field.name))
        _check_hashable(item, join(path, field.name))
        if type(item) is int and any(kind is float for kind, _ in _alternatives(hint)):
            # An integer in JAX stays an integer, with at most 32 bits.
            object.__setattr__(value, field.name, float(item))
    for field, hint in fields:
        item = getattr(value, field.name)
        for rule in getattr(hint, "__metadata__", ()):
            if isinstance(rule, OnlyWith) and item != field.default and not rule.holds(value):
                name = join(path, field.name)
                raise UserError(f"{name} is {show(item)}, {rule.reason(value, path)}")


def check_unset(value: Any, names: Collection[str], reason: str) -> None:
    """Raises UserError if any named field differs from the default.

    Args:
      reason: Why the field has no effect, for the message.
    """
    for field, _ in _fields(type(value)):
        item = getattr(value, field.name)
        if field.name in names and item != field.default:
            raise UserError(
                f"{field.name} is {show(item)}, which has no effect while {reason}; leave it "
                f"out."
            )


def join(path: str, name: str) -> str:
    """Returns the dotted name of a field."""
    return f"{path}.{name}" if path else name


@functools.cache
def _fields(kind: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return [(field, hints[field.name]) for field in dataclasses.fields(kind)]


@functools.cache
def _alternatives(hint: Any) -> list[_Alternative]:
    """Returns the types in a union, each with ranges."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        own = tuple(rule for rule in args[1:] if isinstance(rule, Range | Length))
        return [(kind, rules + own) for kind, rules in _alternatives(args[0])]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [alternative for each in args for alternative in _alternatives(each)]
    return [(hint, ())]


def _check(value: Any, hint: Any, path: str) -> None:
    """Raises UserError for a value outside the field's types and ranges."""
    alternatives = _alternatives(hint)
    for kind, rules in alternatives:
        if _is_a(value, kind) and _is_choice(value, kind) and _is_in_range(value, rules):
            _check_inside(value, kind, path)
            return
    rules = (_rule_for(value, *alternative) for alternative in alternatives)
    wanted = ", or ".join(dict.fromkeys(rules))
    has_type = any(_is_a(value, kind) for kind, _ in alternatives)
    of_type = "" if has_type else f", of type {type(value).__name__}"
    raise UserError(f"{path} is {show(value)}{of_type}; it must be {wanted}.")


def _check_hashable(value: Any, path: str) -> None:
    """Raises UserError for a value that can change, such as a list in an own operator."""
    try:
        hash(value)
    except TypeError as error:
        raise UserError(
            f"{path} is {show(value)}, which can change ({error}); use a tuple or a frozen "
            f"dataclass."
        ) from error


def _is_a(value: Any, kind: Any) -> bool:
    """Returns whether a value has exactly this type, so that JSON keeps the type."""
    if typing.get_origin(kind) is Literal:
        return type(value) in map(type, typing.get_args(kind))
    if kind is float:
        return type(value) in (float, int)
    if kind in (bool, int, str):
        return type(value) is kind
    return isinstance(value, typing.get_origin(kind) or kind)


def _is_choice(value: Any, kind: Any) -> bool:
    return typing.get_origin(kind) is not Literal or value in typing.get_args(kind)


def _is_in_range(value: Any, rules: tuple[Range | Length, ...]) -> bool:
    return value is None or all(rule.accepts(value) for rule in rules)


def _check_inside(value: Any, kind: Any, path: str) -> None:
    if typing.get_origin(kind) is tuple:
        item_hint, _ = typing.get_args(kind)
        for i, item in enumerate(value):
            _check(item, item_hint, join(path, str(i)))
    elif dataclasses.is_dataclass(kind) and not inspect.isabstract(kind):
        check_fields(value, path)
    elif isinstance(value, str | Path) and _UNWRITABLE.search(str(value)):
        raise UserError(
            f"{path} is {show(value)}, with a character that no file can hold; leave it out."
        )
    elif isinstance(value, Path) and _URL.match(str(value)):  # `//` is `/` in a Path
        raise UserError(f"{path} is {show(str(value))}; it must be a path on a disk.")


def _rule_for(value: Any, kind: Any, rules: tuple[Range | Length, ...]) -> str:
    """Returns the rule for a wrong value, for a single type in a union."""
    if rules and (isinstance(rules[0], Range) or _is_a(value, kind)):
        return rules[0].rule(value)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    names = {types.NoneType: "None", bool: "True or False", str: "a text"}
    name = (typing.get_origin(kind) or kind).__name__
    return names.get(kind) or f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
