"""Where configuration values come from, file, variables and options, laid over each other without losing the places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import SequenceMatcher
from enum import IntEnum
from pathlib import Path
from typing import Final

from engine.errors import ConfigError
from engine.schema import CLOSE, Problem, Source, alternatives, show
from engine.text import clean
from engine.yaml_io import join, parse_document, parse_value

VARIABLE_PREFIX: Final = "KDCONSOLE_"
RESERVED_VARIABLES: Final = frozenset(
    f"KDCONSOLE_{name}" for name in ("EVIDENCE", "DEBUG", "HOME", "SETTINGS", "HOSTS")
)
"""Variables that the console itself reads; they are no configuration keys."""

Assignment = tuple[str, object, Source]
"""Full key path, value, where it comes from."""


class Rank(IntEnum):
    """Precedence of sources: a higher one wins."""

    FILE = 0
    VARIABLE = 1
    OPTION = 2
    COMMAND = 3


class Settings:
    """Plain data from several sources, and where each value came from.

    Args:
        tree: the lowest source's values; changed by `put`.
        source: the lowest source.
        shorthands: section to the key that a plain text in the section's place stands for.
    """

    def __init__(self, tree: dict[str, object], source: Source, shorthands: Mapping[str, str]) -> None:
        self.tree = tree
        self.problems: list[Problem] = []
        self._sources = {"": source}
        self._shorthands = shorthands

    def source(self, path: str) -> Source:
        """Where the value at a full path came from; for one that is nowhere, where it should have stood."""
        while path not in self._sources:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self._sources[path]

    def has(self, path: str) -> bool:
        """Whether a source gives the value at a full path, so that it is not a default."""
        node: object = self.tree
        for part in path.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    def put(self, key: str, value: object, source: Source) -> None:
        """Lay one value over what stands there; a section's value takes the place of the whole section."""
        *sections, leaf = key.split(".")
        node, path = self.tree, ""
        for section in sections:
            path = join(path, section)
            if section not in node:
                node[section] = {}
                self._sources[path] = source
            elif path in self._shorthands and (node[section] is None or isinstance(node[section], str)):
                text = node[section]
                node[section] = {} if text is None else {self._shorthands[path]: text}
            below = node[section]
            if not isinstance(below, dict):
                self.problems.append(
                    Problem(source.name(key), f"{clean(path, 200)} is {show(below)}, not a section", (source.rank, 0))
                )
                return
            node = below
        node[leaf] = deepcopy(value)
        for known in [known for known in self._sources if known.startswith(f"{key}.")]:
            del self._sources[known]
        self._sources[key] = source

    def put_all(self, assignments: Iterator[Assignment | Problem]) -> None:
        """`put` each, and keep what could not be read as a problem."""
        for assignment in assignments:
            if isinstance(assignment, Problem):
                self.problems.append(assignment)
            else:
                self.put(*assignment)


def from_text(text: str, name: str, base: Path, shorthands: Mapping[str, str]) -> Settings:
    """The settings of a YAML text.

    Args:
        text: YAML.
        name: how error messages call it.
        base: absolute directory that its relative paths start from.
        shorthands: as `Settings` takes them.

    Raises:
        ConfigError: not YAML of our subset, empty, or no mapping.
    """
    document = parse_document(text, name)
    name = clean(name)
    if document.value is None:
        raise ConfigError(
            f"{name}: empty",
            expected="the sections teacher, student and data at least",
            do="`kdconsole config init` prints a configuration to start from",
        )
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"{name}: {show(document.value)} at the top", expected="a mapping of sections such as `train:`"
        )
    return Settings(document.value, Source(name, base, lines=document.lines), shorthands)


def from_variables(environ: Mapping[str, str], keys: Sequence[str], here: Path) -> Iterator[Assignment | Problem]:
    """What the `KDCONSOLE_<SECTION>__<KEY>` variables set; unknown ones are problems.

    Args:
        environ: all variables; those of other programs are passed over.
        keys: every valid full key path.
        here: absolute directory that relative paths start from.
    """
    known = {VARIABLE_PREFIX + key.upper().replace(".", "__"): key for key in keys}
    for variable in sorted(environ):
        if not variable.startswith(VARIABLE_PREFIX) or variable in RESERVED_VARIABLES:
            continue
        label = clean(variable, 200)
        order = (int(Rank.VARIABLE), 0.0)
        if variable not in known:
            yield Problem(label, f"unknown variable; {_meant_variable(variable, known)}", order)
            continue
        try:
            value = parse_value(environ[variable], label)
        except ConfigError as error:
            yield Problem(label, str(error).removeprefix(f"{label}: "), order)
        else:
            yield known[variable], value, Source(label, here, known[variable], Rank.VARIABLE)


def from_options(sets: Sequence[str], here: Path) -> Iterator[Assignment | Problem]:
    """What `--set KEY=VALUE` options set, in their order.

    Args:
        sets: the texts after `--set`.
        here: absolute directory that relative paths start from.
    """
    order = (int(Rank.OPTION), 0.0)
    for option in sets:
        key, equals, text = option.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            where = f"--set {clean(option, 200)}"
            yield Problem(where, "expected KEY=VALUE, such as --set train.steps=500", order)
            continue
        label = f"--set {clean(key, 200)}"
        try:
            value = parse_value(text, label)
        except ConfigError as error:
            yield Problem(label, str(error).removeprefix(f"{label}: "), order)
        else:
            yield key, value, Source(label, here, key, Rank.OPTION)


def from_command(overrides: Mapping[str, object], options: Mapping[str, str], here: Path) -> Iterator[Assignment]:
    """What a command's own options set.

    Args:
        overrides: full key path to plain data or `Path`; None was not given.
        options: key path to the option's name, such as `--max-steps`, where it has one.
        here: absolute directory that relative paths start from.
    """
    for key, value in overrides.items():
        if value is not None:
            plain = str(value) if isinstance(value, Path) else value
            label = options.get(key, f"command line: {clean(key, 200)}")
            yield key, plain, Source(label, here, key, Rank.COMMAND)


def _meant_variable(variable: str, known: Mapping[str, str]) -> str:
    name = variable.removeprefix(VARIABLE_PREFIX).lower()[:64]
    scores: dict[str, float] = {
        reserved: _alike(name, reserved.removeprefix(VARIABLE_PREFIX).lower()) for reserved in RESERVED_VARIABLES
    }
    for candidate, key in known.items():
        whole, leaf = key.replace(".", "__"), key.rpartition(".")[2]
        scores[candidate] = max(_alike(name, whole), _alike(name.rpartition("__")[2], leaf) - 0.05)
    best = max(scores.values())
    near = sorted(candidate for candidate, score in scores.items() if score == best)[:4]
    return f"did you mean {alternatives(near)}?" if best >= CLOSE else "expected a name such as KDCONSOLE_TRAIN__STEPS"


def _alike(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
