"""Versions of packages, as far as a pre-flight has to compare them."""

from __future__ import annotations

import re
from typing import Final

_SPECIFIER: Final = re.compile(r"(>=|<=|==|!=|~=|<|>)\s*([0-9][0-9.]*)")


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version is in a range such as `>=2.8,<2.14`.

    Compared are release numbers alone: `2.9.0a0+nv25`, as vendors build it, is 2.9.
    """
    have = release(version)
    for sign, text in _SPECIFIER.findall(specifier):
        want = release(text)
        mine, its = _padded(have, want)
        good = {
            ">=": mine >= its,
            "<=": mine <= its,
            "==": mine == its,
            "!=": mine != its,
            "<": mine < its,
            ">": mine > its,
            "~=": mine >= its and have[: len(want) - 1] == want[:-1],
        }[sign]
        if not good:
            return False
    return True


def split_requirement(requirement: str) -> tuple[str, str]:
    """The name, as package registries spell it, and the range that pip is asked for, its lower end first."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    name = found[0] if found else ""
    parts = sorted(requirement[len(name) :].split(","), key=lambda part: part.strip().startswith("<"))
    return re.sub(r"[-_.]+", "-", name).lower(), ",".join(parts).strip()


def release(version: str) -> tuple[int, ...]:
    """The numbers at a version's beginning; (0,) where there are none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part[:9]) for part in found[0].split(".")[:6]) if found else (0,)


def _padded(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    length = max(len(one), len(other))
    return one + (0,) * (length - len(one)), other + (0,) * (length - len(other))
