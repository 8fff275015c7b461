"""Text of a run in a document: cleaned, and nothing in it that the document would take for more than text."""

from __future__ import annotations

import html
import re

from engine.text import clean

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&])")
_BEGINNING = re.compile(r"^(\d*)([-+=#.)])(?=[-+=#]*(?:\s|$))")
"""What makes a line more than a line where it stands first: a list, a heading."""
_LINKED = re.compile(r"@|://|www\.|#\d|\bGH-\d|\b[0-9a-f]{7,40}\b|[\w.+-]+/[\w.-]+#", re.IGNORECASE)
"""What GitHub makes a link or a mention of, wherever it stands in a text; it leaves code alone."""


def escaped(text: str, limit: int = 4096) -> str:
    """Safe between the tags of an HTML or SVG document and between the quotes of an attribute."""
    return html.escape(clean(text, limit), quote=True)


def markdown(text: str, *, code: bool = False, cell: bool = False, limit: int = 4096) -> str:
    """Safe in a line of GitHub's Markdown; as code where asked, or where it would become a link.

    Args:
        text: anything.
        code: it is code.
        cell: it stands in a table, where a bar ends a cell even in code.
        limit: most characters of it.
    """
    shown = clean(text, limit)
    if not shown:
        return ""
    return _code(shown, cell) if code or _LINKED.search(shown) else _plain(shown)


def _plain(text: str) -> str:
    return _BEGINNING.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\1", text))


def _code(text: str, cell: bool) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    if cell:
        # An escaped bar is a bar. One after a backslash is kept from it: readers differ in what the two would be.
        text = text.replace("\\|", "\\ |").replace("|", "\\|")
    return f"{fence}{space}{text}{space}{fence}"


def fenced(lines: list[str] | tuple[str, ...], language: str = "") -> str:
    """Lines as a code block that none of them can end."""
    text = "\n".join(clean(line, 4096) for line in lines)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
