"""A log's bytes as text: whole lines whatever pieces they come in, in bounded memory and whatever their encoding."""

from __future__ import annotations

import codecs
import re
from typing import Final

from engine.text import clean

MAX_MESSAGE: Final = 2_000
"""Characters of a line that are looked at and kept; of a longer one it is said that it was cut."""
MAX_LINE: Final = 4 * MAX_MESSAGE
"""Characters of a line before colours are taken out of it."""
_MAX_BYTES: Final = 64 * 1024
"""Of a line that may still go on; what comes beyond is dropped. Always more than `MAX_LINE` characters."""
_CUT: Final = " (line cut)"
_BOMS: Final = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\))")


class LogText:
    """Bytes in, blocks of whole lines out. UTF-8, or what a byte order mark says; what is neither is replaced."""

    def __init__(self) -> None:
        self._start: bytes | None = b""
        """The first bytes, until they tell the encoding."""
        self._decoder: codecs.IncrementalDecoder | None = None
        self._torn = bytearray()

    def feed(self, data: bytes) -> str | None:
        """The lines that are whole now, without the last newline; None where no line is."""
        if self._start is not None:
            self._start += data
            if len(self._start) < 3:
                return None
            data = self._encoding(self._start)
        if self._decoder is not None:
            data = self._decoder.decode(data).encode()
        return self._whole(data)

    def finish(self) -> str | None:
        """The lines that are left, the last of which nothing ended; None where none is."""
        rest = b"" if self._start is None else self._encoding(self._start)
        if self._decoder is not None:
            rest = self._decoder.decode(rest, True).encode()
        block = self._whole(rest)
        torn = bytes(self._torn).decode("utf-8", "replace") if self._torn else None
        self._torn.clear()
        return block if torn is None else torn if block is None else f"{block}\n{torn}"

    def _encoding(self, start: bytes) -> bytes:
        self._start = None
        for bom, name in _BOMS:
            if start.startswith(bom):
                if name != "utf-8":
                    self._decoder = codecs.getincrementaldecoder(name)("replace")
                return start[len(bom) :]
        return start

    def _whole(self, data: bytes) -> str | None:
        cut = data.rfind(b"\n")
        block = None
        if cut >= 0:
            whole = data[:cut] if not self._torn else bytes(self._torn) + data[:cut]
            self._torn.clear()
            # A newline ends whatever was no UTF-8 before it, so this reads every line as if it stood alone.
            block = whole.decode("utf-8", "replace")
        self._torn += data[cut + 1 : cut + 1 + max(0, _MAX_BYTES - len(self._torn))]
        return block


def plain(line: str) -> list[str]:
    """A line with colours, progress written over itself, control characters or no end, as texts safe to print.

    Progress that was written over itself with carriage returns gives each state of it; there is always one text.
    """
    cut = len(line) > MAX_LINE
    text = _ESCAPE.sub("", line[:MAX_LINE]).expandtabs(4)
    parts = [part.rstrip() for part in text.split("\r") if part and not part.isspace()] or [""]
    return [clean(part, MAX_MESSAGE) + (_CUT if cut or len(part) > MAX_MESSAGE else "") for part in parts]
