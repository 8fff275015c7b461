"""Plain data over a pipe between an answer and its checker: an encoding that can make nothing but plain data.

A frame is its length (4 bytes, big-endian) and JSON in ASCII. None, bool, int up to 2^53, float and str stand in JSON
as they are (floats exactly: their shortest text that reads back, NaN and infinities included), list as an array, all
else as an object with one key: `t` tuple, `s` set, `z` frozenset, `d` dict as pairs, `b` bytes in hex, `i` a larger int
in hex, `c` a complex number, `o` the name of a type that is not carried. The reading side takes nothing else.

Standard library only: this runs inside the sandbox.
"""

from __future__ import annotations

import json
import os
from typing import Any, Final, NoReturn

MAX_FRAME: Final = 4 << 20
"""Bytes of one frame, both ways."""
MAX_DEPTH: Final = 100
"""Containers in containers."""
_EXACT: Final = 1 << 53
_LENGTH: Final = 4
_CHUNK: Final = 1 << 16


class RubbishError(Exception):
    """What came over the pipe is not what can come, or what should go is too much."""


class Opaque:
    """Stands for a value that is not carried: equals nothing, has no truth and no order."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        raise TypeError(f"a value of type {self.kind} is not carried out of the sandbox")

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def encode(value: object, depth: int = 0) -> Any:
    """A value as JSON can carry it; subclasses become their plain base, through the base's own methods.

    Raises:
        RubbishError: nested deeper than `MAX_DEPTH`.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        plain = int.__index__(value)
        return plain if -_EXACT <= plain <= _EXACT else {"i": hex(plain)}
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, complex):
        whole = complex.__pos__(value)
        return {"c": [whole.real, whole.imag]}
    if isinstance(value, bytes):
        return {"b": bytes.hex(value)}
    if depth >= MAX_DEPTH:
        raise RubbishError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        return [encode(item, depth + 1) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"t": [encode(item, depth + 1) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"d": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in dict.items(value)]}
    if isinstance(value, set):
        return {"s": [encode(item, depth + 1) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"z": [encode(item, depth + 1) for item in frozenset.__iter__(value)]}
    return {"o": str.__str__(type(value).__name__)[:100]}


def decode(data: Any, depth: int = 0) -> object:
    """The value of what `encode` made, from somebody who is not trusted.

    Raises:
        RubbishError: it is nothing that `encode` makes.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if depth > MAX_DEPTH:
        _refuse("nested too deep")
    if isinstance(data, list):
        return [decode(item, depth + 1) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        _refuse("not a value")
    ((tag, inner),) = data.items()
    value: object
    try:
        match tag:
            case "i" if isinstance(inner, str):
                value = int(inner, 16)
            case "b" if isinstance(inner, str):
                value = bytes.fromhex(inner)
            case "o" if isinstance(inner, str):
                value = Opaque(inner)
            case "c" if isinstance(inner, list):
                real, imaginary = inner
                value = complex(float(real), float(imaginary))
            case "t" if isinstance(inner, list):
                value = tuple(decode(item, depth + 1) for item in inner)
            case "s" if isinstance(inner, list):
                value = {decode(item, depth + 1) for item in inner}
            case "z" if isinstance(inner, list):
                value = frozenset(decode(item, depth + 1) for item in inner)
            case "d" if isinstance(inner, list):
                value = {decode(key, depth + 1): decode(item, depth + 1) for key, item in inner}
            case _:
                _refuse("not a value")
    except (TypeError, ValueError):
        _refuse("not a value")
    return value


def pack(message: dict[str, Any]) -> bytes:
    """A frame.

    Raises:
        RubbishError: larger than `MAX_FRAME`.
    """
    data = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(data) > MAX_FRAME:
        raise RubbishError(f"{len(data):,} bytes: more than the {MAX_FRAME:,} that are carried")
    return len(data).to_bytes(_LENGTH, "big") + data


def send(descriptor: int, frame: bytes) -> None:
    """Writes all of a frame; OSError where nobody reads any more."""
    view = memoryview(frame)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> dict[str, Any]:
    """The next frame.

    Raises:
        EOFError: the other side is gone.
        RubbishError: it is no frame.
    """
    length = int.from_bytes(_exactly(descriptor, _LENGTH), "big")
    if length > MAX_FRAME:
        _refuse("too long")
    try:
        message = json.loads(_exactly(descriptor, length))
    except (ValueError, RecursionError):
        _refuse("no frame")
    if not isinstance(message, dict):
        _refuse("no frame")
    return message


def _exactly(descriptor: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(descriptor, min(_CHUNK, count - len(data)))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _refuse(why: str) -> NoReturn:
    raise RubbishError(why)
