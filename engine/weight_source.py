"""The tensors of a model's files as arrays, one at a time and whatever the files are: APR or safetensors, mapped."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from engine.apr import mapped, read_apr
from engine.apr_values import Values, values_of
from engine.errors import ModelError
from engine.formats import ModelFiles
from engine.sniff import TensorEntry, read_safetensors_header, regular_size, say, unreadable

_KINDS: Final = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}


@dataclass(frozen=True)
class Weights:
    """A model's tensors; its files are mapped for as long as there is something of them."""

    tensors: Mapping[str, TensorEntry]
    """By name, as stored; begin and end count from a start that depends on the format."""
    values: Callable[[str], Values]
    """A tensor's values by its name; what is stored as floats points into the mapped file."""


def open_weights(files: ModelFiles) -> Weights:
    """Map a model's weight files.

    Raises:
        ModelError: a file cannot be read.
    """
    if files.container is not None:
        apr = read_apr(files.container)
        view = mapped(apr)

        def of_apr(name: str) -> Values:
            _require_long(apr.path, apr.tensors[name].end)
            return values_of(apr, name, view)

        return Weights(apr.tensors, of_apr)
    return open_safetensors(files.weights)


def open_safetensors(paths: Sequence[Path]) -> Weights:
    """Map safetensors files.

    Raises:
        ModelError: one cannot be read.
    """
    tensors: dict[str, TensorEntry] = {}
    places: dict[str, tuple[Path, memoryview]] = {}
    sizes: dict[Path, int] = {}
    for path in paths:
        header = read_safetensors_header(path)
        tensors |= header
        places |= dict.fromkeys(header, (path, _data(path)))
        sizes[path] = regular_size(path)

    def stored(name: str) -> Values:
        path, data = places[name]
        _require_long(path, sizes[path])
        return _stored(name, tensors[name], path, data)

    return Weights(tensors, stored)


def _stored(name: str, entry: TensorEntry, path: Path, data: memoryview) -> Values:
    kind = _KINDS.get(entry.dtype)
    if kind is None:
        raise ModelError(
            f"{say(path)}: tensor {say(name)} is {entry.dtype}",
            expected=", ".join(_KINDS),
            do="take unquantised weights",
        )
    return Values(entry.dtype, np.frombuffer(data[entry.begin : entry.end], kind).reshape(entry.shape))


def _require_long(path: Path, size: int) -> None:
    """Refuses a file that was cut: to read what is mapped and no longer in it ends the process with SIGBUS.

    A file that is cut while one tensor is read still does that.
    """
    if regular_size(path) < size:
        raise ModelError(f"{say(path)}: its size was changed since it was looked at", do="try again")


def _data(path: Path) -> memoryview:
    """What follows the header of a safetensors file that was looked at before."""
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError as error:
        raise unreadable(path, error) from error
    return view[8 + int.from_bytes(view[:8], "little") :]
