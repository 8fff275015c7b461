"""Writes APR containers, version 2: F32, F16 and BF16 tensors, in the layout that `engine.apr` reads.

Flags are 0 and BF16 has the number 2, as this project's own description of the container has them. Readers of the
predecessor since its dtypes follow GGML's numbers know BF16 as 30 only: for those write F32 or F16.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from engine.apr import (
    ALIGNMENT,
    DIMENSIONS_CAP,
    HEADER,
    MAGIC,
    METADATA_CAP,
    NAME_CAP,
    TENSORS_CAP,
    VERSION,
    size_of,
)
from engine.apr_model import CLASSES, FULL_CONFIG, SPELLINGS
from engine.durable import write_new
from engine.errors import ModelError
from engine.sniff import say

_NUMBERS: Final = {"F32": 0, "F16": 1, "BF16": 2}
_NOT_OF_THE_MODEL: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")

Outlines = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name to dtype (F32, F16 or BF16) and shape."""


def require_known(config: Mapping[str, Any], where: Path) -> str:
    """The model type of a configuration whose weights would be read back from an APR file.

    Raises:
        ModelError: they would not.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ModelError(
            f"{say(where)}: model_type {say(kind)}: not written as APR, since the file would not be read back",
            expected=" or ".join(CLASSES),
            do="keep the Hugging Face directory",
        )
    return kind


def metadata_of(config: Mapping[str, Any], outlines: Outlines, where: Path) -> dict[str, Any]:
    """The metadata of a model: the predecessor's keys, and the whole configuration under a key of ours.

    Each value stands once under the predecessor's spelling: its programs refuse a key beside another spelling of it.

    Args:
        config: `config.json`.
        outlines: of the tensors.
        where: named in messages.

    Raises:
        ModelError: an architecture that would not be read back, or a dimension that the configuration does not have.
    """
    kind = require_known(config, where)
    parameters = config.get("rope_parameters")
    base = config.get("rope_theta", parameters.get("rope_theta") if isinstance(parameters, dict) else None)
    known = {**config, "rope_theta": base}
    found = {names[0]: known[key] for key, names in SPELLINGS.items() if known.get(key) is not None}
    if lacking := [
        key for key in SPELLINGS if key not in ("head_dim", "num_key_value_heads") and known.get(key) is None
    ]:
        raise ModelError(
            f"{say(where)}: the configuration has no {lacking[0]}", expected="one that says all dimensions", do="add it"
        )
    return {
        "model_type": kind,
        "architecture": kind,
        "hf_architecture": CLASSES[kind],
        "hf_model_type": kind,
        "original_format": "safetensors",
        **found,
        "param_count": sum(math.prod(shape) for _, shape in outlines.values()),
        "total_size": sum(_size(name, *outline) for name, outline in outlines.items()),
        FULL_CONFIG: {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL},
    }


def write_apr(
    path: Path, metadata: Mapping[str, Any], outlines: Outlines, data: Callable[[str], bytes | memoryview]
) -> str:
    """Write a file that is not there yet, down to the disk; tensor by tensor, so that one at a time is in memory.

    Args:
        path: the file.
        metadata: as it is to stand there, from `metadata_of`.
        outlines: of the tensors.
        data: gives a tensor's bytes by its name, little-endian, row by row; asked in the order of the names.

    Returns:
        SHA-256 of what was to be written.

    Raises:
        ModelError: a name, dtype or number of tensors that the container cannot hold, or bytes of another length.
        OSError: it is there already, or the disk does not take it.
    """
    return write_new(path, _chunks(metadata, outlines, data))


def _chunks(
    metadata: Mapping[str, Any], outlines: Outlines, data: Callable[[str], bytes | memoryview]
) -> Iterator[bytes | memoryview]:
    text = json.dumps(metadata, sort_keys=True).encode()
    if len(text) > METADATA_CAP:
        raise ModelError(f"metadata of {len(text):,} bytes", expected=f"at most {METADATA_CAP:,}")
    if not 0 < len(outlines) <= TENSORS_CAP:
        raise ModelError(f"{len(outlines):,} tensors", expected=f"1 to {TENSORS_CAP:,}")
    for name, (_, shape) in outlines.items():
        _require_writable(name, shape)
    names = sorted(outlines, key=str.encode)
    index, offset = b"", 0
    for name in names:
        dtype, shape = outlines[name]
        encoded, size = name.encode(), _size(name, dtype, shape)
        index += struct.pack(f"<H{len(encoded)}sBB", len(encoded), encoded, _NUMBERS[dtype], len(shape))
        index += struct.pack(f"<{len(shape) + 2}Q", *shape, offset, size)
        offset += size + _padding(size)
    at_index = HEADER.size + len(text) + _padding(len(text))
    at_data = at_index + len(index) + _padding(len(index))
    fields = (MAGIC, *VERSION, 0, len(names), HEADER.size, len(text), at_index, at_data)
    plain = HEADER.pack(*fields, 0, bytes(20))
    header = HEADER.pack(*fields, zlib.crc32(plain[44:], zlib.crc32(plain[:40])), bytes(20))
    footer = 0
    pieces = [header, text, bytes(_padding(len(text))), index, bytes(_padding(len(index)))]
    for piece in pieces:
        footer = zlib.crc32(piece, footer)
        yield piece
    for name in names:
        content = data(name)
        size = _size(name, *outlines[name])
        if len(content) != size:
            raise ModelError(f"tensor {say(name)}: {len(content):,} bytes", expected=f"{size:,} by dtype and shape")
        for part in (content, bytes(_padding(size))):
            footer = zlib.crc32(part, footer)
            yield part
    yield footer.to_bytes(4, "little")


def _require_writable(name: str, shape: tuple[int, ...]) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise ModelError(
            f"tensor {say(name)}: a name that is no UTF-8", expected="one of characters", do="rename it"
        ) from None
    if not 0 < length <= NAME_CAP:
        raise ModelError(f"tensor {say(name)[:80]}: a name of {length:,} bytes", expected=f"1 to {NAME_CAP}")
    if len(shape) > DIMENSIONS_CAP:
        raise ModelError(f"tensor {say(name)}: {len(shape)} dimensions", expected=f"at most {DIMENSIONS_CAP}")


def _size(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    size = size_of(dtype, shape) if dtype in _NUMBERS else None
    if size is None:
        raise ModelError(f"tensor {say(name)}: {say(dtype)} is not written", expected=", ".join(_NUMBERS))
    return size


def _padding(size: int) -> int:
    return -size % ALIGNMENT
