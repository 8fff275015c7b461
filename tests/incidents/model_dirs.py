"""Model directories that go wrong, or look as if they did: made of bytes, without torch."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[2]
TEACHER = ROOT / "engine" / "assets" / "teacher"
WEIGHTS = "model.safetensors"
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16"}
QWEN2_0_5B = QWEN2 | {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4_864,
    "tie_word_embeddings": True,
}
QWEN2_72B = QWEN2 | {
    "vocab_size": 152_064,
    "hidden_size": 8_192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29_568,
    "tie_word_embeddings": False,
}
"""What the real models' config.json say of their sizes."""

Tensors = dict[str, tuple[dict[str, Any], bytes]]
"""Of a safetensors file: each tensor's entry in the header, and its bytes."""


def of_config(path: Path, config: Mapping[str, Any]) -> Path:
    """A directory with nothing but a config.json: enough for a student that starts from random weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def of_builtin_teacher() -> dict[str, Any]:
    """Its config.json."""
    config: dict[str, Any] = json.loads((TEACHER / "config.json").read_text())
    return config


def hollow(path: Path, config: Mapping[str, Any]) -> Path:
    """A whole Qwen2 model of any size whose weights take no room: a real header, and a hole in place of the data."""
    of_config(path, config)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in _qwen2(config):
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with (path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return path


def teacher_with(path: Path, name: str, content: bytes) -> Path:
    """The built-in teacher with another file in place of its weights."""
    _all_but_the_weights(path)
    (path / name).write_bytes(content)
    return path


def teacher_in_two_files(path: Path) -> Path:
    """The built-in teacher with the same weights in two files: no byte of them stands where it stood."""
    _all_but_the_weights(path)
    tensors = sorted(_read(TEACHER / WEIGHTS).items())
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    halves = dict(zip(names, (tensors[::2], tensors[1::2]), strict=True))
    for name, half in halves.items():
        _write(path / name, dict(half))
    places = {tensor: name for name, half in halves.items() for tensor, _ in half}
    index = {"metadata": {"total_size": sum(len(data) for _, (_, data) in tensors)}, "weight_map": places}
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return path


def teacher_with_rows(path: Path, rows: int) -> Path:
    """The built-in teacher, padded with rows that no token has, as large models often are."""
    _all_but_the_weights(path)
    config = of_builtin_teacher()
    before = config["vocab_size"]
    tensors = _read(TEACHER / WEIGHTS)
    for name, (entry, data) in tensors.items():
        if entry["shape"][0] == before and len(entry["shape"]) == 2:
            row = len(data) // before
            tensors[name] = ({**entry, "shape": [rows, entry["shape"][1]]}, data + data[: row * (rows - before)])
    _write(path / WEIGHTS, tensors)
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return path


def _all_but_the_weights(path: Path) -> None:
    shutil.copytree(TEACHER, path, ignore=shutil.ignore_patterns("*.safetensors"))


def _qwen2(config: Mapping[str, Any]) -> Iterable[tuple[str, list[int]]]:
    """Every tensor of a Qwen2 model by name and shape."""
    hidden, inner, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    yield "model.embed_tokens.weight", [vocab, hidden]
    yield "model.norm.weight", [hidden]
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", [vocab, hidden]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name, rows in (("q", hidden), ("k", keys), ("v", keys)):
            yield f"{layer}.self_attn.{name}_proj.weight", [rows, hidden]
            yield f"{layer}.self_attn.{name}_proj.bias", [rows]
        yield f"{layer}.self_attn.o_proj.weight", [hidden, hidden]
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", [inner, hidden]
        yield f"{layer}.mlp.down_proj.weight", [hidden, inner]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", [hidden]


def _read(path: Path) -> Tensors:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {name: (entry, data[slice(*entry["data_offsets"])]) for name, entry in header.items()}


def _write(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (entry, data) in tensors.items():
        header[name] = {**entry, "data_offsets": [end, end + len(data)]}
        end += len(data)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(data for _, data in tensors.values()))
