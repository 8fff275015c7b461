"""Plain data held against msgspec structs: every problem at once, each with its place, its value and what was expected.

msgspec's own `convert` stops at the first problem and knows neither lines nor nearest keys; here the structs stay the
one schema, and this room walks them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

import msgspec.inspect as ms

from engine.text import clean
from engine.yaml_io import join, plain_scalar

SHORTHAND = "kd_shorthand"
"""Class attribute of a struct that a plain text may stand for: the name of the one field it fills."""
BUILTIN = "builtin"
"""Key of `Meta(extra=…)` that makes a text a path: the names beginning with `builtin` that may stand in its place."""

CLOSE = 0.65
"""Likeness, 0 to 1, from which a name is offered in place of an unknown one."""

_MAX_INTEGER = 2**63 - 1
ON_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}:(?:/|~/)")
"""How a path begins that is not on this machine: `host:/path`, `host:~/path`."""
_MAX_SUGGESTIONS = 100  # far more than are ever shown; likeness to every key costs a millisecond each
_NUMBER_KINDS = (ms.IntType, ms.FloatType)


@dataclass(frozen=True)
class Source:
    """Where values come from: a file, a variable, an option."""

    label: str
    """How messages name it, such as `config.yaml` or `--set train.steps`."""
    base: Path
    """Absolute directory that relative paths start from."""
    key: str = ""
    """The full path of the key that it sets; empty: the whole configuration."""
    rank: int = 0
    """Precedence: a higher one wins, and its problems are listed later."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """Line of each full path, where lines are known."""

    def name(self, path: str) -> str:
        """How messages name a key that comes from here."""
        return self.label if path == self.key else f"{self.label}: {clean(path, 200)}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, complete with its place."""

    where: str
    """Source and full key path, such as `config.yaml: train.steps`."""
    text: str
    order: tuple[int, float] = (0, 0.0)

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class Walker:
    """Holds plain data against a type and collects what is wrong.

    Args:
        source_of: the source of the value at a full path.
        keys: every valid full path, for suggestions.
        aliases: other names for a key (its last part, lower case), to the full path meant.
    """

    def __init__(
        self, source_of: Callable[[str], Source], keys: Sequence[str], aliases: Mapping[str, str] | None = None
    ) -> None:
        self.problems: list[Problem] = []
        self._source_of = source_of
        self._keys = keys
        self._aliases = aliases or {}

    def add(self, path: str, text: str) -> None:
        """Note a problem with the key at `path`."""
        source = self._source_of(path)
        line = source.lines.get(path)
        order = (source.rank, math.inf if line is None else line)
        self.problems.append(Problem(source.name(path), text, order))

    def check(self, value: object, kind: ms.Type, path: str = "") -> object:
        """The value with shorthands written out and paths made absolute; meaningless once there are problems."""
        meant = _choose(value, kind)
        if isinstance(meant, ms.StructType):
            return self._struct(value, meant, path)
        bare, extra = _bare(meant)
        if isinstance(bare, ms.ListType) and isinstance(value, list):
            if len(value) < (bare.min_length or 0):
                self._wrong(value, kind, path)
            return [self.check(element, bare.item_type, f"{path}[{index}]") for index, element in enumerate(value)]
        if isinstance(bare, ms.StrType) and isinstance(value, str):
            if _fits(value, bare):
                return self._text(value, kind, extra, path)
            self._wrong(value, kind, path)
            return value
        if not _fits(value, bare):
            self._wrong(value, kind, path)
            return value
        if isinstance(bare, ms.FloatType) and isinstance(value, int | float):
            return float(value) + 0.0  # -0.0 and 0.0 are one value
        return value

    def _struct(self, value: object, kind: ms.StructType, path: str) -> object:
        shorthand = getattr(kind.cls, SHORTHAND, None)
        if shorthand is not None and isinstance(value, str):
            inner = next(f for f in kind.fields if f.encode_name == shorthand)
            return {shorthand: self.check(value, inner.type, path)}
        if not isinstance(value, dict):
            self._wrong(value, kind, path)
            return value
        fields = {f.encode_name: f for f in kind.fields}
        result: dict[str, object] = {}
        for key, inner_value in value.items():
            below = join(path, key)
            if key in fields:
                result[key] = self.check(inner_value, fields[key].type, below)
            else:
                self.add(below, f"unknown key{self._suggestion(key, path, tuple(fields))}")
        for key, wanted in fields.items():
            if wanted.required and key not in value:
                self.add(join(path, key), f"missing; expected {expected(wanted.type)}")
        return result

    def _suggestion(self, key: str, path: str, siblings: Sequence[str]) -> str:
        if len(self.problems) >= _MAX_SUGGESTIONS:
            return ""
        if key in self._keys and "." in key:
            section, _, leaf = key.rpartition(".")
            return f"; write {leaf} as a key of its own below {section}"
        near = nearest(key, path, self._keys, self._aliases)
        if near:
            return f"; did you mean {alternatives(near)}?"
        return f"; expected {alternatives(siblings)}" if len(siblings) <= 16 else ""

    def _text(self, value: str, kind: ms.Type, extra: Mapping[str, object], path: str) -> str:
        if clean(value, len(value) + 1) != value:
            self.add(path, f"{show(value)}: expected text without control characters")
        elif BUILTIN in extra:
            return self._resolved(value, kind, extra[BUILTIN], path)
        return value

    def _resolved(self, value: str, kind: ms.Type, builtins: object, path: str) -> str:
        if isinstance(builtins, tuple) and value in builtins:
            return value
        if value == "builtin" or value.startswith("builtin:"):
            if isinstance(builtins, tuple):
                self.add(path, f"{show(value)}: expected {expected(kind)}{_did_you_mean(value, builtins)}")
            return value
        if ON_HOST.match(value):
            return value
        home = os.path.expanduser(value)
        if value.startswith("~") and home == value:
            self.add(path, f"{show(value)}: no such user's home directory; expected {expected(kind)}")
            return value
        return os.path.abspath(self._source_of(path).base / home)

    def _wrong(self, value: object, kind: ms.Type, path: str) -> None:
        self.add(path, f"{show(value)}: expected {expected(kind)}{_hint(value, kind)}")


def nearest(key: str, section: str, keys: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """The valid full paths most like an unknown key: at most four, equally near ones; empty when none is near.

    Args:
        key: the unknown key, without its section.
        section: where it stands; its own keys are preferred to equally near ones elsewhere.
        keys: every valid full path.
        aliases: other names in use, lower case, to the full path meant.
    """
    key = key[:64].lower()
    if key in aliases:
        return [aliases[key]]
    scores: dict[str, float] = {}
    for candidate in keys:
        parent, _, leaf = candidate.rpartition(".")
        ratio = SequenceMatcher(None, key, leaf).ratio()
        if ratio >= CLOSE:
            scores[candidate] = ratio + (0.1 if parent == section else 0.0)
    best = max(scores.values(), default=0.0)
    return [candidate for candidate, score in scores.items() if score == best][:4]


def key_paths(kind: ms.Type, path: str = "") -> Iterator[str]:
    """Every valid full path below a type, sections before their keys."""
    for inner in _options(kind):
        if isinstance(inner, ms.StructType):
            for member in inner.fields:
                below = join(path, member.encode_name)
                yield below
                yield from key_paths(member.type, below)


def show(value: object) -> str:
    """A value as messages show it: cleaned, short, text in double quotes."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return f'"{clean(str(value), 80)}"'


def alternatives(words: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def expected(kind: ms.Type) -> str:
    """What a type takes, in words."""
    return alternatives([word for option in sorted(_options(kind), key=_null_last) for word in _words(option)])


def _words(kind: ms.Type) -> list[str]:
    bare, _ = _bare(kind)
    description = (kind.extra_json_schema or {}).get("description") if isinstance(kind, ms.Metadata) else None
    if isinstance(description, str):
        return [description]
    if isinstance(bare, ms.StructType):
        return ["a path", "a mapping"] if hasattr(bare.cls, SHORTHAND) else ["a mapping"]
    if isinstance(bare, ms.LiteralType):
        return [str(value) for value in bare.values]
    if isinstance(bare, ms.BoolType):
        return ["true", "false"]
    if isinstance(bare, _NUMBER_KINDS):
        return [("an integer" if isinstance(bare, ms.IntType) else "a number") + _bounds(bare)]
    return ["a list" if isinstance(bare, ms.ListType) else "null" if isinstance(bare, ms.NoneType) else "text"]


def _bounds(kind: ms.IntType | ms.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge} to {kind.le}"
    words = []
    if kind.gt is not None:
        words.append(f"above {kind.gt}")
    if kind.ge is not None:
        words.append(f"of at least {kind.ge}")
    if kind.lt is not None:
        words.append(f"below {kind.lt}")
    if kind.le is not None:
        words.append(f"of at most {kind.le}" if not words else f"at most {kind.le}")
    return f" {' and '.join(words)}" if words else ""


def _bare(kind: ms.Type) -> tuple[ms.Type, Mapping[str, object]]:
    return (kind.type, kind.extra or {}) if isinstance(kind, ms.Metadata) else (kind, {})


def _options(kind: ms.Type) -> tuple[ms.Type, ...]:
    return tuple(kind.types) if isinstance(kind, ms.UnionType) else (kind,)


def _null_last(kind: ms.Type) -> bool:
    return isinstance(kind, ms.NoneType)


def _choose(value: object, kind: ms.Type) -> ms.Type:
    """The member of a union that the value was meant for; the union itself when it is none of them."""
    options = _options(kind)
    wanted: tuple[type[ms.Type], ...]
    if value is None:
        wanted = (ms.NoneType,)
    elif isinstance(value, list):
        wanted = (ms.ListType,)
    elif isinstance(value, dict):
        wanted = (ms.StructType,)
    else:
        wanted = (ms.StructType, ms.StrType, ms.LiteralType) if isinstance(value, str) else _NUMBER_KINDS
    return next((option for option in options if isinstance(_bare(option)[0], wanted)), kind)


def _fits(value: object, kind: ms.Type) -> bool:
    if isinstance(kind, ms.NoneType):
        return value is None
    if isinstance(kind, ms.StrType):
        return isinstance(value, str) and _written(value, kind)
    if isinstance(kind, ms.LiteralType):
        return isinstance(value, str) and value in kind.values
    if isinstance(kind, ms.BoolType):
        return isinstance(value, bool)
    if isinstance(kind, ms.IntType):
        return isinstance(value, int) and not isinstance(value, bool) and _within(value, kind)
    if isinstance(kind, ms.FloatType):
        return isinstance(value, int | float) and not isinstance(value, bool) and _within(value, kind)
    return False


def _written(value: str, kind: ms.StrType) -> bool:
    return (
        len(value) >= (kind.min_length or 0)
        and (kind.max_length is None or len(value) <= kind.max_length)
        and (kind.pattern is None or re.search(kind.pattern, value) is not None)
    )


def _within(value: int | float, kind: ms.IntType | ms.FloatType) -> bool:
    if not math.isfinite(value) or (isinstance(kind, ms.IntType) and abs(value) > _MAX_INTEGER):
        return False
    return (
        (kind.gt is None or value > kind.gt)
        and (kind.ge is None or value >= kind.ge)
        and (kind.lt is None or value < kind.lt)
        and (kind.le is None or value <= kind.le)
    )


def _hint(value: object, kind: ms.Type) -> str:
    options = [_bare(option)[0] for option in _options(kind)]
    number = next((option for option in options if isinstance(option, _NUMBER_KINDS)), None)
    literal = next((option for option in options if isinstance(option, ms.LiteralType)), None)
    if number is not None and isinstance(value, str) and len(value) <= 32:
        meant = plain_scalar(value.strip().replace("_", "").replace(",", ""))
        if isinstance(meant, int | float) and not isinstance(meant, bool) and _fits(meant, number):
            return f"; write {show(meant)}, a number without quotes, underscores or commas"
    if isinstance(number, ms.IntType) and isinstance(value, int) and value > _MAX_INTEGER:
        return f" and at most {_MAX_INTEGER}"
    if isinstance(number, ms.IntType) and isinstance(value, float) and value.is_integer() and _fits(int(value), number):
        return f"; write {int(value)}"
    if literal is not None and isinstance(value, str):
        return _did_you_mean(value, [str(word) for word in literal.values])
    structs = [option for option in options if isinstance(option, ms.StructType)]
    if structs and isinstance(value, str) and any(f.encode_name == "path" for f in structs[0].fields):
        return "; write the text as its key `path`"
    if structs and value is None and len(options) == 1:
        return "; leave it out, or give it keys"
    return ""


def _did_you_mean(value: str, words: Sequence[str]) -> str:
    scores = {word: SequenceMatcher(None, value[:64].lower(), word).ratio() for word in words}
    best = max(scores, key=lambda word: scores[word], default=None)
    return f"; did you mean {best}?" if best is not None and scores[best] >= CLOSE else ""
