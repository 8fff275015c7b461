"""Single changes to a run directory, of every kind that an accident makes; each says where it was."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dispatch.manifest import SUMS, sha256_file
from dispatch.sums import files_of, write_sums

LINES = ("config.yaml", "contract.yaml", "dispatch.json", "events.jsonl", "launch.log", "supervisor.jsonl", SUMS)
EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Damage:
    """One change; who finds it has to name one of `names`, and `line` of the stream where there is one."""

    what: str
    names: tuple[str, ...]
    line: int | None = None


def reseal(directory: Path) -> None:
    """Writes new checksums, as whoever wants to hide a change would."""
    write_sums(directory, {name: sha256_file(directory / name) for name in files_of(directory)[0]})


def everything(directory: Path) -> list[str]:
    """Every file that is part of the evidence."""
    return sorted([*files_of(directory)[0], SUMS])


def flipped(directory: Path, choose: random.Random) -> Damage:
    """One bit of one byte."""
    name = choose.choice(everything(directory))
    raw = bytearray((directory / name).read_bytes())
    at = choose.randrange(len(raw))
    before = raw.count(b"\n", 0, at)
    raw[at] ^= 1 << choose.randrange(8)
    names = _named(directory, name, [before])
    (directory / name).write_bytes(raw)
    return Damage(f"bit of byte {at} flipped in {name}", names)


def appended(directory: Path, choose: random.Random) -> Damage:
    """A byte at the end of a file."""
    name = choose.choice(everything(directory))
    with (directory / name).open("ab") as file:
        file.write(bytes([choose.randrange(256)]))
    return Damage(f"a byte appended to {name}", (name,))


def shortened(directory: Path, choose: random.Random) -> Damage:
    """The last byte of a file is gone."""
    name = choose.choice(everything(directory))
    raw = (directory / name).read_bytes()
    names = _named(directory, name, [raw.count(b"\n", 0, len(raw) - 1)])
    (directory / name).write_bytes(raw[:-1])
    return Damage(f"{name} is a byte shorter", names)


def lines_changed(kind: str) -> Callable[[Path, random.Random], Damage]:
    """A line deleted, doubled, inserted (a copy of another one) or swapped with the next one."""

    def change(directory: Path, choose: random.Random) -> Damage:
        name = choose.choice(LINES)
        lines = (directory / name).read_bytes().splitlines(keepends=True)
        at = choose.randrange(len(lines) - 1)
        names = _named(directory, name, [at, at + 1])
        if kind == "deleted":
            del lines[at]
        elif kind == "doubled":
            lines.insert(at, lines[at])
        elif kind == "inserted":
            lines.insert(at, choose.choice(lines))
        else:
            while lines[at] == lines[at + 1]:
                at = choose.randrange(len(lines) - 1)
            names = _named(directory, name, [at, at + 1])
            lines[at], lines[at + 1] = lines[at + 1], lines[at]
        (directory / name).write_bytes(b"".join(lines))
        line = (at + 2 if kind == "doubled" else at + 1) if name == EVENTS else None
        if kind == "inserted":
            line = None  # a copy of the line that stands there is one of the next
        return Damage(f"line {at + 1} of {name} {kind}", names, line)

    return change


def hash_edited(directory: Path, choose: random.Random) -> Damage:
    """One digit of one hash."""
    lines = (directory / SUMS).read_text().splitlines(keepends=True)
    at, digit = choose.randrange(len(lines)), choose.randrange(64)
    names = _named(directory, SUMS, [at])
    new = choose.choice([each for each in "0123456789abcdef" if each != lines[at][digit]])
    lines[at] = lines[at][:digit] + new + lines[at][digit + 1 :]
    (directory / SUMS).write_text("".join(lines))
    return Damage(f"digit {digit} of the hash in line {at + 1} of {SUMS}", names)


def name_edited(directory: Path, choose: random.Random) -> Damage:
    """One letter of one name in the list."""
    lines = (directory / SUMS).read_text().splitlines(keepends=True)
    at = choose.randrange(len(lines))
    names = _named(directory, SUMS, [at])
    place = choose.randrange(66, len(lines[at]) - 1)
    new = "q" if lines[at][place] == "z" else "z"
    lines[at] = lines[at][:place] + new + lines[at][place + 1 :]
    (directory / SUMS).write_text("".join(lines))
    return Damage(f"letter {place - 66} of the name in line {at + 1} of {SUMS}", names)


def renamed(directory: Path, choose: random.Random) -> Damage:
    """A file with another name."""
    name = choose.choice(files_of(directory)[0])
    os.rename(directory / name, directory / f"{name}.bak")
    return Damage(f"{name} renamed", (name,))


def removed(directory: Path, choose: random.Random) -> Damage:
    """A file that is gone."""
    name = choose.choice(files_of(directory)[0])
    (directory / name).unlink()
    return Damage(f"{name} removed", (name,))


def added(directory: Path, choose: random.Random) -> Damage:
    """A file that was not there."""
    folder = choose.choice(["", "model/", "checkpoints/", "notes/"])
    name = f"{folder}extra-{choose.randrange(1000)}.txt"
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text("?")
    return Damage(f"{name} added", (name,))


def linked(directory: Path, choose: random.Random) -> Damage:
    """A file replaced by a link to the very same bytes."""
    name = choose.choice(files_of(directory)[0])
    aside = directory.parent / "aside"
    os.rename(directory / name, aside)
    (directory / name).symlink_to(aside)
    return Damage(f"{name} replaced by a link", (name,))


def emptied(directory: Path, choose: random.Random) -> Damage:
    """A file of no bytes."""
    name = choose.choice(everything(directory))
    (directory / name).write_bytes(b"")
    return Damage(f"{name} emptied", (name,))


KINDS: tuple[Callable[[Path, random.Random], Damage], ...] = (
    flipped,
    flipped,
    appended,
    shortened,
    *(lines_changed(kind) for kind in ("deleted", "inserted", "doubled", "swapped")),
    hash_edited,
    name_edited,
    renamed,
    removed,
    added,
    linked,
    emptied,
)


def _named(directory: Path, name: str, lines: list[int]) -> tuple[str, ...]:
    """The file, and where it is the list the files whose lines were touched."""
    if name != SUMS:
        return (name,)
    told = (directory / SUMS).read_text().splitlines()
    return (SUMS, *(told[at][66:] for at in lines if at < len(told)))
