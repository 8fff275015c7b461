"""APR files made byte by byte with struct, independent of the project's own writer, and doctored as a test wants."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QWEN2: dict[str, Any] = {
    "architecture": "qwen2",
    "hf_architecture": "Qwen2ForCausalLM",
    "hf_model_type": "qwen2",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 48,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}
"""What the predecessor's metadata says of the model that `qwen2_shapes` has."""


@dataclass
class Entry:
    """One index entry; offset and size are what the data needs unless they are set."""

    name: bytes
    dtype: int
    shape: Sequence[int]
    data: bytes
    offset: int | None = None
    size: int | None = None
    ndim: int | None = None
    name_length: int | None = None


@dataclass
class Apr:
    """A file to be; every field that is set stands in the file in place of the right one."""

    entries: list[Entry]
    metadata: Any = field(default_factory=lambda: dict(QWEN2))
    magic: bytes = b"APR\0"
    version: tuple[int, int] = (2, 0)
    flags: int = 0
    count: int | None = None
    header: dict[str, int] = field(default_factory=dict)
    """metadata_offset, metadata_size, index_offset, data_offset."""
    header_crc: int | None = None
    footer_crc: int | None = None
    between: int = 0
    """Bytes too many before the data."""

    def bytes(self) -> bytes:
        raw = self.metadata if isinstance(self.metadata, bytes) else json.dumps(self.metadata).encode()
        index, data = b"", b""
        for entry in self.entries:
            offset = len(data) if entry.offset is None else entry.offset
            size = len(entry.data) if entry.size is None else entry.size
            length = len(entry.name) if entry.name_length is None else entry.name_length
            index += struct.pack("<H", length) + entry.name
            index += struct.pack("<BB", entry.dtype, len(entry.shape) if entry.ndim is None else entry.ndim)
            index += b"".join(struct.pack("<Q", n) for n in entry.shape) + struct.pack("<QQ", offset, size)
            data += entry.data + bytes(-len(entry.data) % 64)
        index_at = 64 + len(raw) + -len(raw) % 64
        data_at = index_at + len(index) + -len(index) % 64 + self.between
        places = {"metadata_offset": 64, "metadata_size": len(raw), "index_offset": index_at, "data_offset": data_at}
        places |= self.header
        start = self.magic + bytes(self.version) + struct.pack("<H", self.flags)
        start += struct.pack("<I", len(self.entries) if self.count is None else self.count)
        start += struct.pack(
            "<QIQQ", *(places[n] for n in ("metadata_offset", "metadata_size", "index_offset", "data_offset"))
        )
        crc = zlib.crc32(start + bytes(20)) if self.header_crc is None else self.header_crc
        whole = start + struct.pack("<I", crc) + bytes(20) + raw + bytes(-len(raw) % 64)
        whole += index + bytes(-len(index) % 64) + bytes(self.between) + data
        return whole + struct.pack("<I", zlib.crc32(whole) if self.footer_crc is None else self.footer_crc)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


def qwen2_shapes(layers: int = 2, vocab: int = 48, tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 of hidden size 32, 4 heads, 2 key-value heads, feed-forward size 64."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, 32), "model.norm.weight": (32,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, 32)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (32,),
            f"{at}.post_attention_layernorm.weight": (32,),
            f"{at}.self_attn.q_proj.weight": (32, 32),
            f"{at}.self_attn.q_proj.bias": (32,),
            f"{at}.self_attn.k_proj.weight": (16, 32),
            f"{at}.self_attn.k_proj.bias": (16,),
            f"{at}.self_attn.v_proj.weight": (16, 32),
            f"{at}.self_attn.v_proj.bias": (16,),
            f"{at}.self_attn.o_proj.weight": (32, 32),
            f"{at}.mlp.gate_proj.weight": (64, 32),
            f"{at}.mlp.up_proj.weight": (64, 32),
            f"{at}.mlp.down_proj.weight": (32, 64),
        }
    return shapes


def small() -> Apr:
    """The smallest file that is whole: two tensors, no model."""
    return Apr(
        [Entry(b"a", 0, (2, 2), struct.pack("<4f", 1, 2, 3, 4)), Entry(b"b", 1, (3,), struct.pack("<3e", 5, 6, 7))]
    )
