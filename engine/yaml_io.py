"""A strict subset of YAML, read and written: one document of plain data, every key once, no tags, no aliases.

Plain scalars follow the YAML 1.2 core schema rather than PyYAML's 1.1: `5e-7` is a number, `on` and `no` are text,
`010` is ten.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml

from engine.errors import ConfigError
from engine.text import clean

MAX_BYTES = 1 << 20
"""Largest YAML text taken, in bytes of UTF-8; refused before anything is parsed."""
MAX_DEPTH = 32
MAX_DIGITS = 64
STDIN = Path("-")
"""The file name that means standard input."""

Plain = None | bool | int | float | str

_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_TRUE = frozenset(("true", "True", "TRUE"))
_FALSE = frozenset(("false", "False", "FALSE"))
_INTEGER = re.compile(r"[-+]?[0-9]+\Z")
_BASED = re.compile(r"0(?:o[0-7]+|x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)\Z")
_NAN = frozenset((".nan", ".NaN", ".NAN"))


class Document(NamedTuple):
    """A parsed YAML text: its value, and the line (from 1) of every key and list element by its full path."""

    value: object
    lines: dict[str, int]


def read_text(file: Path) -> str:
    """The text of a YAML file, or of standard input where `file` is `-`.

    Raises:
        ConfigError: missing, not readable, a directory, larger than `MAX_BYTES`, or not UTF-8.
    """
    name = source_name(file)
    try:
        if file == STDIN:
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with file.open("rb") as opened:
                content = opened.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{name}: no such file", do="`kdconsole config init > config.yaml` writes one to start from"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: is a directory", expected="a YAML file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{name}: cannot be read: {clean(reason)}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than 1 MiB", expected="a configuration of a few kilobytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = content[error.start], content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}: line {line}: not UTF-8 (byte 0x{byte:02x})", expected="UTF-8 text") from None


def source_name(file: Path) -> str:
    """How messages call a file."""
    return "standard input" if file == STDIN else clean(str(file))


def parse_yaml(text: str, source: str) -> object:
    """Plain data of one YAML document: dict with text keys, list, str, int, float, bool or None (an empty text).

    Args:
        text: the YAML text.
        source: how error messages call it, such as the file's name.

    Raises:
        ConfigError: larger than `MAX_BYTES`, not YAML, or outside the subset; with line and column.
    """
    return parse_document(text, source).value


def parse_document(text: str, source: str) -> Document:
    """Like `parse_yaml`, with the lines where everything stands."""
    source = clean(source)
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than 1 MiB", expected="a configuration of a few kilobytes")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except _Refused as error:
        raise ConfigError(f"{source}: {error}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        code = ord(text[error.position])
        raise ConfigError(
            f"{source}: line {line}, column {column}: character U+{code:04X} is not allowed in YAML"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source}: {_syntax_error(error)}") from None
    except (ValueError, OverflowError):  # PyYAML's scanner passes on what chr() raises
        raise ConfigError(f"{source}: a \\U escape stands for no character", expected="at most \\U0010FFFF") from None
    document = Document(None, {})
    if node is None:
        return document
    try:
        return document._replace(value=_plain_data(node, "", document.lines))
    except _Refused as error:
        raise ConfigError(f"{source}: {error}") from None


def parse_value(text: str, source: str) -> object:
    """The value of an option or a variable: a flow list, a mapping or a quoted text in YAML, else one plain scalar.

    Anything that is no number, truth value or null is text as it stands, so that a path may hold `#`, `: ` or `@`.

    Raises:
        ConfigError: it begins like a list, a mapping or a quoted text and is none.
    """
    text = text.strip(" \t")
    if text[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text, source)
    try:
        return plain_scalar(text)
    except _Refused as error:
        raise ConfigError(f"{clean(source)}: {error}") from None


def plain_scalar(text: str) -> Plain:
    """What an unquoted scalar means in the YAML 1.2 core schema."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.match(text) or _BASED.match(text):
        if len(text) > MAX_DIGITS:
            raise _Refused(f"a number of {len(text)} digits; expected at most {MAX_DIGITS}")
        return int(text, 10 if _INTEGER.match(text) else 0)
    if _FLOAT.match(text):
        return float(text)
    if _INFINITE.match(text):
        return -math.inf if text.startswith("-") else math.inf
    return math.nan if text in _NAN else text


def dump_yaml(data: object) -> str:
    """Plain data as YAML that `parse_yaml` reads back to the same value, keys in their order."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=sys.maxsize
    )


def join(path: str, key: str) -> str:
    """The full path of a key: `train` and `steps` give `train.steps`."""
    return f"{path}.{key}" if path else key


class _Refused(Exception):
    """Outside the subset; the text says where and why, without the source's name."""


class _Loader(yaml.SafeLoader):
    """Composes nodes only; nothing is ever constructed from a tag."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        where = _at(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _Refused(f"{where}: anchors (&) and aliases (*) are not supported; write the value out, or quote it")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _Refused(f"{where}: tag {clean(str(tag), 80)} is not supported; write the plain value, or quote it")
        if self.depth >= MAX_DEPTH:
            raise _Refused(f"{where}: nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        ambiguous = not isinstance(plain_scalar(text), str)
    except _Refused:
        ambiguous = True
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if ambiguous else None)


_Dumper.add_representer(str, _represent_text)


def _plain_data(node: yaml.Node, path: str, lines: dict[str, int]) -> object:
    if isinstance(node, yaml.MappingNode):
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Refused(f"{_at(key_node.start_mark)}: a list or mapping as a key; expected plain text")
            key = str(key_node.value)
            below = join(path, key)
            line = key_node.start_mark.line + 1
            if key in found:
                raise _Refused(f"{clean(below, 200)}: line {line}: key given twice, first in line {lines[below]}")
            lines[below] = line
            found[key] = _plain_data(value_node, below, lines)
        return found
    if isinstance(node, yaml.SequenceNode):
        elements = []
        for index, element in enumerate(node.value):
            below = f"{path}[{index}]"
            lines[below] = element.start_mark.line + 1
            elements.append(_plain_data(element, below, lines))
        return elements
    if not isinstance(node, yaml.ScalarNode):
        _unreachable(node)
    if node.style is not None:
        return str(node.value)
    try:
        return plain_scalar(node.value)
    except _Refused as error:
        raise _Refused(f"{_at(node.start_mark)}: {error}") from None


def _unreachable(node: yaml.Node) -> NoReturn:
    raise AssertionError(f"PyYAML composes scalars, sequences and mappings only, not {type(node).__name__}")


def _syntax_error(error: yaml.MarkedYAMLError) -> str:
    if error.context == "expected a single document in the stream":
        mark = error.problem_mark
        return f"{_at(mark)}: a second document (---) begins; expected one document"
    reason = clean(error.problem or error.context or "not YAML", 200)
    hint = "; indent with spaces, not tabs" if "'\\t'" in reason else ""
    return f"{_at(error.problem_mark or error.context_mark)}: {reason}{hint}"


def _at(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
