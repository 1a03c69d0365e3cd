"""Compiled programs as text: instructions and computations."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_OPERAND = re.compile(r"%([\w.-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_MEMORY_SPACE = re.compile(r"S\([1-9]\d*\)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type and sizes."""

    dtype: str
    sizes: tuple[int, ...]
    in_main_memory: bool = True
    """False for arrays in on-chip memory or in the host's memory."""
    in_host_memory: bool = False

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def num_bytes(self) -> int:
        """Bytes without padding."""
        return math.ceil(self.num_elements * _bits(self.dtype) / 8)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)  # s32, u8, f8e4m3fn
    assert digits is not None, f"an array type without size: {dtype}"
    return int(digits[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """An instruction of a compiled program."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """The result's arrays."""
    operands: tuple[str, ...]
    arguments: str
    """The text between the parentheses; a parameter's number."""
    attributes: str
    is_root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of called computations."""
        found = _CALLED.findall(self.attributes)
        return tuple(name.lstrip("%") for text in found for name in _names(text))

    @property
    def trips(self) -> int | None:
        """Iterations of a loop; None if unknown."""
        match = _TRIPS.search(self.attributes)
        return None if match is None else int(match[1])

    @property
    def index(self) -> int:
        """The position that a `get-tuple-element` reads."""
        match = re.search(r"\bindex=(\d+)", self.attributes)
        assert match is not None, f"{self.name} has no index"
        return int(match[1])

    def called_as(self, role: str) -> str:
        """Returns the name of the computation called as a role, such as `body`."""
        match = re.search(rf"\b{role}=%?([\w.-]+)", self.attributes)
        assert match is not None, f"{self.name} has no {role}"
        return match[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.num_bytes for shape in self.shapes)


def _names(text: str) -> list[str]:
    return [each.strip() for each in text.strip("{}").split(",") if each.strip()]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction]

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions whose results an instruction reads."""
        return [self.instructions[name] for name in instruction.operands]

    @property
    def root(self) -> Instruction:
        """The instruction with the computation's result."""
        return next(each for each in self.instructions.values() if each.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def called(self, instruction: Instruction) -> list[Computation]:
        """Returns the computations that an instruction calls."""
        return [self.computations[name] for name in instruction.called]


def parse_module(text: str) -> Module:
    """Returns the module of a compiled program's text."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            current = Computation(header[2], {})
            computations[current.name] = current
            entry = current.name if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(match)
            current.instructions[instruction.name] = instruction
    return Module(computations, entry)


def _parse_instruction(match: re.Match[str]) -> Instruction:
    kind, rest = _split_type(_COMMENT.sub("", match[3]))
    opcode, _, rest = rest.partition("(")
    arguments, attributes = _split_parenthesis(f"({rest}")
    return Instruction(
        name=match[2],
        opcode=opcode.strip(),
        shapes=tuple(_shapes(kind)),
        operands=tuple(_OPERAND.findall(arguments)),
        arguments=arguments[1:-1],
        attributes=attributes,
        is_root=bool(match[1]),
    )


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, sizes, layout in _SHAPE.findall(text):
        elsewhere, on_host = _MEMORY_SPACE.search(layout) is not None, "S(5)" in layout
        numbers = tuple(int(size) for size in sizes.split(",") if size)
        yield Shape(dtype, numbers, in_main_memory=not elsewhere, in_host_memory=on_host)


def _split_type(text: str) -> tuple[str, str]:
    """Returns an instruction's type, and the text after the type."""
    if text.startswith("("):
        return _split_parenthesis(text)
    kind, _, rest = text.partition(" ")
    return kind, rest


def _split_parenthesis(text: str) -> tuple[str, str]:
    """Returns a text's first parenthesis, and the text after it."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"a parenthesis without end: {text[:80]}")
