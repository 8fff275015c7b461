"""What a file is, told from its first bytes, and bounded readers for safetensors headers and JSON.

Nothing here trusts a file: reads are capped, offsets are checked against the file's size, and a name that came
from a file is cleaned before it stands in a message. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from engine.errors import ModelError
from engine.text import clean

HEADER_CAP = 16 * 2**20
"""Most bytes of a safetensors header."""

_SNIFF_BYTES = 512
_MAX_DIMENSIONS = 64
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"], 8),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 16),
    **dict.fromkeys(["U32", "I32", "F32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
}
_CONVERT = (
    "give it by its own name, its tokenizer.json beside it, or convert it: `kdconsole convert FILE DIR` makes a "
    "Hugging Face directory with safetensors weights of it"
)
_PICKLE = (
    "pickle can run code and is never loaded: open it where you trust it and save it again with save_pretrained, "
    "which writes safetensors"
)
DOWNLOAD = "download the file again"


class Format(Enum):
    """What a file is, by its first bytes; the value is how a message names it."""

    SAFETENSORS = "safetensors"
    APR = "an APR container"
    GGUF = "a GGUF file"
    PICKLE = "a Python pickle"
    TORCH = "a PyTorch pickle archive (torch.save)"
    ZIP = "a zip archive"
    LFS = "a git-LFS pointer (the weights themselves were never fetched)"
    HTML = "a web page (HTML or XML), saved in place of the model"
    JSON = "JSON text"
    TEXT = "plain text"
    EMPTY = "an empty file"
    ZEROS = "nothing but zero bytes at its start (an unfinished download or a lost write)"
    SHORT = "too short to be any model"
    UNKNOWN = "of no known model format"


_ADVICE = {
    Format.APR: _CONVERT,
    Format.GGUF: "`kdconsole import FILE --to DIR` makes a model directory of it",
    Format.PICKLE: _PICKLE,
    Format.TORCH: _PICKLE,
    Format.ZIP: "unpack it and give the directory that holds config.json",
    Format.LFS: "run `git lfs pull` in its repository",
    Format.HTML: f"{DOWNLOAD}: the server answered with a page, often a login or an error",
    Format.JSON: f"{DOWNLOAD}: the server answered with a message and not with the weights",
    Format.TEXT: f"{DOWNLOAD}: the server answered with a message and not with the weights",
    Format.EMPTY: f"{DOWNLOAD}, or export the model again",
    Format.ZEROS: f"{DOWNLOAD}, or export the model again",
    Format.SHORT: f"{DOWNLOAD}, or export the model again",
    Format.UNKNOWN: "check the path, or download the file again",
}


class TensorEntry(NamedTuple):
    """One tensor as a safetensors header names it; `begin` and `end` count bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def identify(path: Path) -> Format:
    """Tell a file's format from its first bytes, whatever its name says.

    Raises:
        ModelError: the path is no regular file, or cannot be read.
    """
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(_SNIFF_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    return _classify(start, size)


def require_safetensors(path: Path) -> None:
    """Refuse a weights file that is not safetensors, naming the format found.

    Raises:
        ModelError: the file is of another format; each has its own message.
    """
    found = identify(path)
    if found is not Format.SAFETENSORS:
        refuse(path, found)


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file; the tensors' bytes are not read.

    Checked: format, header size (16 MiB cap), JSON, names that stand twice, dtypes, that each tensor's byte count is
    shape times dtype, and that the tensors fill the file from the header to its end without gap or overlap.

    Raises:
        ModelError: any of these does not hold, or the header names no tensor.

    Source: safetensors format, https://huggingface.co/docs/safetensors (format section).
    """
    require_safetensors(path)
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > HEADER_CAP:
                raise ModelError(
                    f"{say(path)}: the safetensors header says it is {length:,} bytes long",
                    expected=f"at most {HEADER_CAP:,}",
                    do=f"the file is damaged: {DOWNLOAD}",
                )
            if length > size - 8:
                raise ModelError(
                    f"{say(path)}: truncated: its header should take {length:,} bytes, the file has {size - 8:,}",
                    expected="a whole safetensors file",
                    do=DOWNLOAD,
                )
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    header = _decode(raw, path, "the safetensors header", unique=True)
    header.pop("__metadata__", None)
    if not header:
        raise ModelError(
            f"{say(path)}: {size:,} bytes, a valid safetensors header that names no tensor: there are no weights in it",
            expected="the model's tensors",
            do="the export that wrote it wrote nothing; export or download the model again",
        )
    entries = {name: _entry(name, value, path) for name, value in header.items()}
    _check_layout(entries, size - 8 - length, path)
    return entries


def read_json(path: Path, cap: int, *, unique: bool = False) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most `cap` bytes; `unique` refuses keys that stand twice.

    Raises:
        ModelError: no such file, too large, not JSON, or not an object.
    """
    size = regular_size(path)
    if size > cap:
        raise ModelError(
            f"{say(path)}: {size:,} bytes", expected=f"at most {cap:,}", do="check that it is the right file"
        )
    try:
        with path.open("rb") as file:
            raw = file.read(cap)
    except OSError as error:
        raise unreadable(path, error) from error
    if (found := _classify(raw[:_SNIFF_BYTES], len(raw))) in (Format.LFS, Format.HTML, Format.EMPTY):
        raise ModelError(f"{say(path)}: {found.value}", expected="a JSON object", do=_ADVICE[found])
    return _decode(raw, path, "", unique=unique)


def _classify(start: bytes, size: int) -> Format:
    if size == 0:
        return Format.EMPTY
    if start[:4] in (b"APR\0", b"APRN", b"APR1", b"APR2"):
        return Format.APR
    if start[:4] == b"GGUF":
        return Format.GGUF
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        # torch.save names its first member ARCHIVE/data.pkl, within the first local header.
        return Format.TORCH if b"data.pkl" in start else Format.ZIP
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Format.PICKLE
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return Format.LFS
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--")):
        return Format.HTML
    # Bytes 0 to 7 are the header's length: with text in them it would be over 2**48.
    if start[8:9] == b"{" and start[6:8] == b"\0\0":
        return Format.SAFETENSORS
    if text.startswith((b"{", b"[")):
        return Format.JSON
    if not any(start):
        return Format.ZEROS
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return Format.TEXT
    return Format.SHORT if size < 10 else Format.UNKNOWN


def refuse(path: Path, found: Format, role: str = "") -> NoReturn:
    """Raise the `ModelError` that belongs to a file of the wrong format."""
    what = f"{role} {say(path)}".strip()
    said = found.value if found is not Format.UNKNOWN else f"{found.value} (first bytes {_first_bytes(path)})"
    raise ModelError(f"{what}: {said}", expected="safetensors weights in a Hugging Face directory", do=_ADVICE[found])


def _first_bytes(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(8).hex(" ")


def _entry(name: str, value: object, path: Path) -> TensorEntry:
    def broken(why: str) -> ModelError:
        return ModelError(
            f"{say(path)}: tensor {say(name)}: {why}", expected="a well-formed safetensors header", do=DOWNLOAD
        )

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise broken("its entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise broken(f"unknown dtype {say(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(is_count(n) for n in shape):
        raise broken(f"bad shape {say(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(n) for n in offsets):
        raise broken(f"bad data_offsets {say(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        takes = clean(f"{-(-bits // 8):,}", 40)
        raise broken(f"{end - begin:,} bytes stored, {dtype} of shape {say(shape)} takes {takes}")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _check_layout(entries: Mapping[str, TensorEntry], available: int, path: Path) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "a gap before it" if entry.begin > position else "an overlap with the one before it"
            raise ModelError(
                f"{say(path)}: tensor {say(name)} begins at byte {entry.begin:,} of the data, with {kind}",
                expected=f"tensors one after the other, this one at {position:,}",
                do=DOWNLOAD,
            )
        position = entry.end
    if position > available:
        raise ModelError(
            f"{say(path)}: truncated: {available:,} bytes of tensor data, its header promises {position:,}",
            expected="a whole safetensors file",
            do=DOWNLOAD,
        )
    if position < available:
        raise ModelError(
            f"{say(path)}: {available - position:,} bytes after the last tensor",
            expected=f"{position:,} bytes of tensor data, as its header says",
            do=DOWNLOAD,
        )


def _decode(raw: bytes, path: Path, part: str, *, unique: bool) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if unique and len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ModelError(f"{where}: {say(twice)} stands twice", expected="each name once", do=DOWNLOAD)
        return result

    where = f"{say(path)}: {part}" if part else say(path)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{where}: not JSON ({clean(str(error), 200)})", expected="a JSON object", do=DOWNLOAD
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: JSON, but not an object", expected="a JSON object", do=DOWNLOAD)
    return value


def is_count(value: object) -> bool:
    """Whether a value out of JSON is an integer that can count bytes or elements."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def regular_size(path: Path) -> int:
    """Size of a file in bytes; anything but a regular file is refused, as opening it could block for ever."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{say(path)}: not a regular file", expected="a file", do="check the path")
    return status.st_size


def unreadable(path: Path, error: OSError) -> ModelError:
    """The error for a path that the operating system would not let us read."""
    reason = error.strerror or type(error).__name__
    return ModelError(
        f"{say(path)}: cannot be read: {reason}", expected="a readable file", do="check path and permissions"
    )


def say(value: object) -> str:
    """Text of a name or value out of a file, safe to stand in a message."""
    try:
        return clean(str(value), 512)
    except RecursionError:
        return "a deeply nested value"
