"""Weights of the predecessor: a reader for its APR container, version 2, without torch and without trust.

Header, metadata and tensor index are read whole, within bounds that are checked first; the tensors' bytes are mapped.
Where everything lies, in this order: header (64 bytes), metadata (JSON), index, tensors, CRC-32 of all before it.

Sources: the container as this project's own description has it; flags from 64 on, dtype 30 (newer files' number of
BF16), 128 and 129 (newer files' Q4 and Q8) and the layouts of Q4 and Q8 from the public source of its writer and
readers, https://github.com/paiml/aprender, `crates/apr-format/src/v2/` (`mod.rs`, `tensor_index_impl.rs`,
`streaming_writer.rs`).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from engine.errors import ModelError
from engine.sniff import DOWNLOAD, Format, TensorEntry, identify, refuse, regular_size, say, unreadable

MAGIC: Final = b"APR\0"
HEADER: Final = struct.Struct("<4sBBHIQIQQI20s")
FOOTER_BYTES: Final = 4
ALIGNMENT: Final = 64
VERSION: Final = (2, 0)
METADATA_CAP: Final = 16 << 20
NAME_CAP: Final = 256
DIMENSIONS_CAP: Final = 8
TENSORS_CAP: Final = 1 << 16
_FIXED: Final = 2 + 1 + 1 + 8 + 8
"""Bytes of an index entry beside its name and dimensions."""
_LARGEST_ENTRY: Final = _FIXED + NAME_CAP + 8 * DIMENSIONS_CAP
_CHUNK: Final = 8 << 20

COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
"""Files beside an APR file that go with it, where they are."""

DTYPES: Final = {
    0: "F32",
    1: "F16",
    2: "BF16",
    30: "BF16",
    3: "F64",
    4: "I32",
    5: "I64",
    6: "I8",
    7: "U8",
    8: "Q4",
    128: "Q4",
    9: "Q8",
    129: "Q8",
    12: "Q4_K",
    14: "Q6_K",
}
"""Number to name. BF16, Q4 and Q8 have a second number in newer files."""
_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I32": 4, "I64": 8, "I8": 1, "U8": 1}
_BLOCKS: Final = {"Q4": (32, 18), "Q4_K": (256, 144), "Q6_K": (256, 210)}
"""Values and bytes of a block; a last block of Q4 may be padded, the others hold whole blocks only."""

QUANTISED: Final = 32
_REFUSED_FLAGS: Final = {
    1: ("LZ4", "compressed with LZ4"),
    2: ("Zstd", "compressed with Zstd"),
    4: ("encrypted", "encrypted"),
    16: ("sharded", "one of several parts of a model"),
    64: ("filterbank", "a model of sound"),
    2048: ("column-major", "stored column by column"),
}
_HARMLESS_FLAGS: Final = 8 | QUANTISED | 128 | 256 | 512 | 1024
"""Signed (its signature is not looked at), quantised (dtypes say it), model card, streaming, vocabulary, row-major."""

Poll = Callable[[], None]


AprTensor = TensorEntry
"""One tensor of the index; `begin` and `end` count bytes from the start of the file."""


@dataclass(frozen=True)
class AprFile:
    """An APR file whose header, metadata and index were read and found sound."""

    path: Path
    metadata: dict[str, Any]
    """As it stands there, untrusted; of a key that stands twice the last."""
    tensors: dict[str, AprTensor]
    """By name, sorted; names are not cleaned."""
    flags: int
    size: int
    """Of the whole file, in bytes."""


def read_apr(path: Path) -> AprFile:
    """Read and check header, metadata and index; of the tensors' bytes only the extents are checked.

    Checked: format, version, the header's CRC, flags, that the parts lie in the file one after the other, the
    metadata's size (16 MiB) and form, and of each tensor: name (256 bytes, UTF-8, sorted, once), dtype, dimensions
    (8), alignment (64 bytes), size against dtype and shape, place in the data, and that no two overlap.

    Raises:
        ModelError: any of these does not hold; each has its own message.
    """
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            parts = _header(header, size, path)
            file.seek(parts.metadata)
            metadata = _metadata(file.read(parts.metadata_bytes), path)
            file.seek(parts.at_index)
            index = file.read(min(parts.at_data - parts.at_index, parts.tensors * _LARGEST_ENTRY))
    except OSError as error:
        raise unreadable(path, error) from error
    tensors = _index(index, parts, size - FOOTER_BYTES, path)
    _require_apart(tensors, path)
    return AprFile(path, metadata, tensors, parts.flags, size)


def require_whole(path: Path, poll: Poll = lambda: None) -> None:
    """Check the CRC-32 that ends the file against all bytes before it, read once from beginning to end.

    Takes seconds for a file of some GB: a third of one a GB for the sum, and what the disk takes to bring it.

    Args:
        path: the file.
        poll: called between pieces of 8 MiB; may raise to stop.

    Raises:
        ModelError: they differ, or the file cannot be read.
    """
    left = regular_size(path) - FOOTER_BYTES
    found = 0
    try:
        with path.open("rb", buffering=0) as file:
            while left > 0 and (piece := file.read(min(_CHUNK, left))):
                found = zlib.crc32(piece, found)
                left -= len(piece)
                poll()
            footer = file.read(FOOTER_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    stated = int.from_bytes(footer, "little")
    if left > 0 or len(footer) < FOOTER_BYTES or stated != found:
        raise ModelError(
            f"{say(path)}: its last four bytes say CRC-32 {stated:08x}, all bytes before them have {found:08x}",
            expected="a whole APR file, which ends in the CRC-32 of everything before it",
            do=f"it is damaged, cut short, or was written without its checksum: {DOWNLOAD}",
        )


def mapped(apr: AprFile) -> memoryview:
    """The file's bytes, mapped copy-on-write: nothing is read before it is looked at, the file is never changed.

    The mapping lasts as long as this view or anything made of it.

    Raises:
        ModelError: the file is not what it was when it was read.
    """
    try:
        with apr.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != apr.size:
                raise ModelError(f"{say(apr.path)}: its size was changed since it was looked at", do="try again")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError as error:
        raise unreadable(apr.path, error) from error


def size_of(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor of this dtype (by name) and shape; None where its values fill no whole number of blocks."""
    values = math.prod(shape)
    if dtype == "Q8":
        return values + 4 if values else 0
    if dtype in _BLOCKS:
        block, stored = _BLOCKS[dtype]
        if dtype != "Q4" and values % block:
            return None
        return -(-values // block) * stored
    return values * _BYTES[dtype]


class _Parts(NamedTuple):
    """Where the header says that the parts begin."""

    flags: int
    tensors: int
    metadata: int
    metadata_bytes: int
    at_index: int
    at_data: int


def _header(raw: bytes, size: int, path: Path) -> _Parts:
    if raw[:4] != MAGIC:
        _refuse_other(raw, path)
    if size < HEADER.size + FOOTER_BYTES:
        raise _cut(path, f"the file has {size:,} bytes, header and footer alone take {HEADER.size + FOOTER_BYTES}")
    fields = HEADER.unpack(raw)
    _, major, minor, flags, count, metadata, metadata_size, index, data, stated, _ = fields
    if major != VERSION[0]:
        raise ModelError(
            f"{say(path)}: an APR container of version {major}.{minor}",
            expected="version 2",
            do="write it again with a program of its predecessor that writes version 2",
        )
    found = zlib.crc32(raw[44:64], zlib.crc32(raw[:40]))
    if stated != found:
        raise ModelError(
            f"{say(path)}: the header says CRC-32 {stated:08x} and has {found:08x}",
            expected="an undamaged header",
            do=f"the file is damaged: {DOWNLOAD}",
        )
    _require_readable(flags, path)
    if metadata_size > METADATA_CAP:
        raise ModelError(
            f"{say(path)}: metadata of {metadata_size:,} bytes", expected=f"at most {METADATA_CAP:,}", do=DOWNLOAD
        )
    end = size - FOOTER_BYTES
    for name, begin, stop in (
        ("metadata", metadata, metadata + metadata_size),
        ("tensor index", index, index),
        ("tensor data", data, data),
    ):
        if stop > end:
            raise _cut(path, f"the {name} should go to byte {stop:,}, the file ends at {end:,}")
        if begin < HEADER.size:
            raise _broken(path, f"the {name} begins at byte {begin:,}, within the header")
    if not metadata + metadata_size <= index <= data:
        raise _broken(
            path,
            f"its parts overlap: metadata from {metadata:,} to {metadata + metadata_size:,}, index from {index:,}, "
            f"data from {data:,}",
        )
    if data % ALIGNMENT:
        raise _broken(path, f"the tensor data begins at byte {data:,}, which is no multiple of {ALIGNMENT}")
    if not count:
        raise ModelError(
            f"{say(path)}: names no tensor: there are no weights in it",
            expected="the model's tensors",
            do="the export that wrote it wrote nothing; export or download the model again",
        )
    if count > TENSORS_CAP:
        raise _broken(path, f"{count:,} tensors; read are files of at most {TENSORS_CAP:,}")
    if count * _FIXED > data - index:
        raise _broken(path, f"{count:,} tensors in an index of {data - index:,} bytes")
    return _Parts(flags, count, metadata, metadata_size, index, data)


def _refuse_other(raw: bytes, path: Path) -> None:
    found = identify(path)
    if found is Format.APR:
        raise ModelError(
            f"{say(path)}: an APR container of another kind: it begins with {say(raw[:4].decode('ascii', 'replace'))}",
            expected="version 2, which begins with APR and a zero byte",
            do="write it again with a program of its predecessor that writes version 2",
        )
    if found is Format.SAFETENSORS:
        raise ModelError(
            f"{say(path)}: a safetensors file", expected="an APR file", do=f"give its directory, {say(path.parent)}"
        )
    refuse(path, found)


def _require_readable(flags: int, path: Path) -> None:
    for bit, (flag, meaning) in _REFUSED_FLAGS.items():
        if flags & bit:
            raise ModelError(
                f"{say(path)}: flag {flag} ({bit}) is set: it is {meaning}, which is not read",
                expected="a plain APR file of a whole language model",
                do="write it again without that, with the program that wrote it",
            )
    if unknown := flags & ~_HARMLESS_FLAGS:
        raise ModelError(
            f"{say(path)}: unknown flag {unknown & -unknown} is set (flags {flags:#06x})",
            expected="flags whose meaning is known",
            do="write it again with a program of its predecessor that does not set it",
        )


def _metadata(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        # Of keys that stand twice, as programs of the predecessor wrote some, Python's reader keeps the last.
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its metadata is not JSON ({say(error)[:200]})") from error
    if not isinstance(value, dict):
        raise _broken(path, "its metadata is JSON, but not an object")
    return value


def _index(raw: bytes, parts: _Parts, end: int, path: Path) -> dict[str, AprTensor]:
    tensors: dict[str, AprTensor] = {}
    at, before = 0, b""
    for number in range(parts.tensors):
        if len(raw) - at < 2:
            raise _broken(path, f"its index ends within entry {number + 1:,} of {parts.tensors:,}")
        length = int.from_bytes(raw[at : at + 2], "little")
        if not 0 < length <= NAME_CAP:
            raise _broken(path, f"entry {number + 1:,} has a name of {length:,} bytes, not 1 to {NAME_CAP}")
        name = raw[at + 2 : at + 2 + length]
        at += 2 + length
        if len(raw) - at < 2:
            raise _broken(path, f"its index ends within entry {number + 1:,} of {parts.tensors:,}")
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(path, f"the name of entry {number + 1:,} is not UTF-8") from error
        if name == before:
            raise _broken(path, f"tensor {say(text)} stands twice")
        if name < before:
            raise _broken(path, f"tensor {say(text)} stands after {say(before.decode())}: the index is not sorted")
        kind, dimensions = raw[at], raw[at + 1]
        if dimensions > DIMENSIONS_CAP:
            raise _broken(path, f"tensor {say(text)} has {dimensions} dimensions, not at most {DIMENSIONS_CAP}")
        at += 2
        numbers = 8 * (dimensions + 2)
        if len(raw) - at < numbers:
            raise _broken(path, f"its index ends within entry {number + 1:,} of {parts.tensors:,}")
        *shape, offset, size = struct.unpack_from(f"<{dimensions + 2}Q", raw, at)
        at += numbers
        tensors[text] = _tensor(text, kind, tuple(shape), parts.at_data + offset, size, end, path)
        before = name
    return tensors


def _tensor(name: str, kind: int, shape: tuple[int, ...], begin: int, size: int, end: int, path: Path) -> AprTensor:
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise ModelError(
            f"{say(path)}: tensor {say(name)} has the unknown dtype {kind}",
            expected=f"one of {', '.join(dict.fromkeys(DTYPES.values()))}",
            do="write it again with a program of its predecessor, as F32, F16 or BF16",
        )
    if any(n >= 2**63 for n in shape) or math.prod(shape) >= 2**63:
        raise _broken(path, f"tensor {say(name)}: shape {say(list(shape))} has more values than any file")
    takes = size_of(dtype, shape)
    if takes is None:
        raise _broken(path, f"tensor {say(name)}: {dtype} of shape {say(list(shape))} is no whole number of blocks")
    if size != takes:
        raise _broken(
            path, f"tensor {say(name)}: {size:,} bytes stored, {dtype} of shape {say(list(shape))} takes {takes:,}"
        )
    if begin % ALIGNMENT:
        raise _broken(path, f"tensor {say(name)} begins at byte {begin:,}, which is no multiple of {ALIGNMENT}")
    if begin + size > end:
        raise _cut(path, f"tensor {say(name)} should go to byte {begin + size:,}, the data ends at {end:,}")
    return AprTensor(dtype, shape, begin, begin + size)


def _require_apart(tensors: dict[str, AprTensor], path: Path) -> None:
    position, last = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.end == tensor.begin:
            continue
        if tensor.begin < position:
            raise _broken(path, f"tensor {say(name)} begins at byte {tensor.begin:,}, within tensor {say(last)}")
        position, last = tensor.end, name


def _broken(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{say(path)}: {why}",
        expected="a well-formed APR container",
        do=f"the file is damaged: {DOWNLOAD}, or write it again",
    )


def _cut(path: Path, why: str) -> ModelError:
    return ModelError(f"{say(path)}: truncated: {why}", expected="a whole APR container", do=DOWNLOAD)
