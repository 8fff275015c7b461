"""The tensors of an APR file as arrays of floats, and floats in another dtype.

The layouts of Q4 and Q8 are named in `engine.apr`; those of Q4_K and Q6_K are ggml's and left to the `gguf` package.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.apr import AprFile, size_of
from engine.apr_model import no_weights
from engine.errors import ModelError
from engine.sniff import say

INSTALL: Final = "pip install 'kdconsole[import]'"
_CHUNK_BLOCKS: Final = 1 << 15


class Values(NamedTuple):
    """A tensor's values; `array` holds bit patterns (uint16) where `dtype` is BF16, which numpy has not."""

    dtype: str
    """F32, F16, BF16 or F64."""
    array: NDArray[Any]


def values_of(apr: AprFile, name: str, view: memoryview) -> Values:
    """One tensor as floats: as stored, or dequantised to float32.

    Args:
        apr: the file.
        name: of the tensor.
        view: of the file's bytes, from `engine.apr.mapped`; what is not quantised points into it and is not copied.

    Raises:
        ModelError: it is of integers, or Q4_K or Q6_K and the `gguf` package is not installed.
    """
    tensor = apr.tensors[name]
    raw = view[tensor.begin : tensor.end]
    match tensor.dtype:
        case "F32" | "F16" | "F64":
            kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[tensor.dtype]
            return Values(tensor.dtype, np.frombuffer(raw, kind).reshape(tensor.shape))
        case "BF16":
            return Values("BF16", np.frombuffer(raw, "<u2").reshape(tensor.shape))
        case "Q8":
            flat = _q8(raw)
        case "Q4":
            flat = _q4(raw, math.prod(tensor.shape))
        case "Q4_K" | "Q6_K":
            flat = _by_gguf(raw, tensor.dtype, apr)
        case _:
            raise no_weights(apr, name)
    return Values("F32", flat.reshape(tensor.shape))


def converted(values: Values, dtype: str) -> Values:
    """The values in another dtype (F32, F16 or BF16), rounded to the nearest, ties to even.

    Raises:
        ModelError: a finite value is too large for it.
    """
    if values.dtype == dtype:
        return values
    wide = values.array
    if values.dtype == "BF16":
        wide = (wide.astype(np.uint32) << 16).view(np.float32)
    if dtype == "BF16":
        wide = _narrowed(wide, np.float32)
        bits = np.ascontiguousarray(wide).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        result = Values("BF16", np.where(np.isnan(wide), (bits >> 16 | 0x40).astype(np.uint16), rounded))
        lost = np.isfinite(wide) & ((result.array & 0x7FFF) == 0x7F80)
        if bool(lost.any()):
            raise _too_large(dtype)
        return result
    return Values(dtype, _narrowed(wide, np.float16 if dtype == "F16" else np.float32))


def _narrowed(wide: NDArray[Any], kind: type[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = wide.astype(kind, copy=False)
    if bool((np.isinf(narrow) & np.isfinite(wide)).any()):
        raise _too_large("F16" if kind is np.float16 else "F32")
    return narrow


def _too_large(dtype: str) -> ModelError:
    return ModelError(f"a value is too large for {dtype}", expected="a dtype that holds the weights", do="take fp32")


def _q8(raw: memoryview) -> NDArray[np.float32]:
    """One float32 scale for the whole tensor, then one signed byte a value; see the sources of `engine.apr`."""
    if not len(raw):
        return np.empty(0, np.float32)
    scale = np.frombuffer(raw[:4], "<f4").astype(np.float32)
    return np.multiply(np.frombuffer(raw[4:], np.int8), scale, dtype=np.float32)


def _q4(raw: memoryview, values: int) -> NDArray[np.float32]:
    """Blocks of 32: a float16 scale, 16 bytes of nibbles, the even value low; value = (nibble - 8) x scale."""
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, 18)
    result = np.empty((len(blocks), 32), np.float32)
    for at in range(0, len(blocks), _CHUNK_BLOCKS):
        part = blocks[at : at + _CHUNK_BLOCKS]
        scale = np.ascontiguousarray(part[:, :2]).view("<f2").astype(np.float32)
        nibbles = part[:, 2:]
        result[at : at + _CHUNK_BLOCKS, 0::2] = ((nibbles & 15).astype(np.float32) - 8) * scale
        result[at : at + _CHUNK_BLOCKS, 1::2] = ((nibbles >> 4).astype(np.float32) - 8) * scale
    return result.reshape(-1)[:values]


def _by_gguf(raw: memoryview, dtype: str, apr: AprFile) -> NDArray[np.float32]:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ModelError(
            f"{say(apr.path)}: {dtype} weights need a package that is not installed ({error.name or 'gguf'})",
            do=INSTALL,
        ) from error
    # The block's size in bytes, as `size_of` has it: a super-block holds 256 values.
    stored = size_of(dtype, (256,))
    assert stored is not None
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, stored)
    result = np.empty((len(blocks), 256), np.float32)
    for at in range(0, len(blocks), _CHUNK_BLOCKS):
        part = blocks[at : at + _CHUNK_BLOCKS]
        result[at : at + _CHUNK_BLOCKS] = dequantize(part, GGMLQuantizationType[dtype])
    return result.reshape(-1)
