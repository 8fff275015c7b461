"""One row of an estimate: a thing that takes room, where, and how its bytes were computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Device = Literal["cpu", "cuda", "mps"]
Pool = Literal["device", "host", "disk"]

MIB, GIB = 1 << 20, 1 << 30


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that takes room."""

    name: str
    bytes: int
    where: Pool
    how: str
    """How the bytes were computed, in words."""


def total(rows: Iterable[Row], where: Pool | None = None) -> int:
    """Bytes of all rows, or of those in one pool."""
    return sum(row.bytes for row in rows if where is None or row.where == where)


def counted(number: int) -> str:
    """A number of parameters or tokens, in words."""
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"
