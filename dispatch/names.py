"""Names of files that come from a host: what may become a path here, and what may not."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from dispatch.host_tool import MAX_FILES, PART
from dispatch.tool_client import HostToolError
from engine.text import clean

MAX_PART: Final = 255
MAX_NAME: Final = 1024
MAX_DEPTH: Final = 32


class LeftOut(NamedTuple):
    """Something in a directory that is not fetched; both texts are safe to print."""

    name: str
    reason: str


def problem(name: str) -> str | None:
    """Why an honest host's name cannot be used here, None when it can.

    Raises:
        ValueError: no honest host has such a name.
    """
    parts = name.split("/")
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise ValueError(name)
    if clean(name, len(name) + 1) != name:
        return "control or unreadable characters in its name"
    if len(name.encode()) > MAX_NAME or len(parts) > MAX_DEPTH or any(len(part.encode()) > MAX_PART for part in parts):
        return "too long a name"
    return None


def check_names(listing: Mapping[str, Any], host: str) -> tuple[dict[str, int], tuple[LeftOut, ...]]:
    """The regular files of a host's listing with their sizes, and what is left out of it.

    Raises:
        HostToolError: a name would leave the directory, or the listing is none: nothing is fetched from such a host.
    """
    files: dict[str, int] = {}
    left_out: list[LeftOut] = []
    folded: dict[str, str] = {}
    given, others = listing.get("files"), listing.get("others")
    if not isinstance(given, list) or not isinstance(others, list) or len(given) + len(others) > MAX_FILES:
        raise HostToolError(f"{host}: answers no listing")
    for entry in (*given, *others):
        kind: str | None = None
        size = 0
        match entry:
            case [str(name), int(size), int()] if size >= 0:
                pass
            case [str(name), str(kind)]:
                pass
            case _:
                raise HostToolError(f"{host}: answers no listing: {clean(repr(entry), 300)}")
        try:
            reason = problem(name)
        except ValueError:
            raise HostToolError(
                f"{host}: names a file {clean(repr(name), 300)}, which no directory has", do="nothing was fetched"
            ) from None
        reason = kind or reason
        if reason is None:
            # Some file systems take two such names for one; the first would be overwritten.
            same = unicodedata.normalize("NFC", name).casefold()
            if same in folded:
                reason = f"differs from {folded[same]} in upper and lower case alone"
            elif name.endswith(PART):
                reason = "a transfer that is not finished"
            else:
                folded[same] = name
        if reason is None:
            files[name] = size
        else:
            left_out.append(LeftOut(clean(name, 300), clean(reason, 400)))
    return files, tuple(left_out)
