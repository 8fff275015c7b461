"""Untrusted text (file contents, logs, tensor names, host output) made safe to print on a terminal."""

from __future__ import annotations

import re

ELLIPSIS = "…"

_UNSAFE = re.compile(
    "["
    "\x00-\x1f"  # C0, which starts every escape sequence
    "\x7f-\x9f"  # DEL and C1; some terminals take U+009B for ESC [
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidi controls: text that reads in another order than it stands
    "\u2028\u2029"  # line and paragraph separators
    "\ud800-\udfff"  # lone surrogates, which no UTF-8 stream can write
    "]"
)


def clean(text: str, limit: int = 4096, keep: str = "") -> str:
    r"""Replace what could steer a terminal or reorder a line by visible escapes such as `\x1b` and `\u202e`.

    Replaced are C0, DEL, C1, bidi controls, line and paragraph separators and lone surrogates.

    Args:
        text: anything, from anywhere.
        limit: most characters returned, at least 1; a longer text is cut and ends in an ellipsis.
        keep: characters left as they are, such as `"\t\n"` for text that may have several lines.

    Returns:
        At most `limit` characters; `text` itself where nothing had to be done.
    """
    cut = len(text) > limit
    if not cut and text.isprintable():  # str.isprintable is False for every character of _UNSAFE
        return text
    safe = _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text[:limit])
    if cut or len(safe) > limit:
        return safe[: limit - 1] + ELLIPSIS
    return safe


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
