"""What a model directory or APR file holds, told from bounded reads, without torch or transformers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any, Literal

from engine.apr import read_apr, require_whole
from engine.apr_model import config_of
from engine.errors import ModelError
from engine.sniff import (
    DOWNLOAD,
    HEADER_CAP,
    Format,
    TensorEntry,
    identify,
    is_count,
    read_json,
    read_safetensors_header,
    refuse,
    require_safetensors,
    say,
    unreadable,
)
from engine.text import clean

__all__ = [
    "BUILTINS",
    "CONFIG_CAP",
    "HEADER_CAP",
    "INDEX_CAP",
    "Format",
    "ModelFiles",
    "Role",
    "TensorEntry",
    "identify",
    "inspect_model_dir",
    "read_json",
    "read_safetensors_header",
    "read_tensors",
    "require_safetensors",
    "resolve_builtin",
    "same_files",
]

Role = Literal["teacher", "student"]

CONFIG_CAP = 4 * 2**20
INDEX_CAP = 64 * 2**20
ASSETS = Path(__file__).parent / "assets"
BUILTINS = ("teacher", "student")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
RACY_NS = 2_000_000_000
"""A file written to so shortly before it was read could be written to again without its times telling."""
_WHOLE: set[tuple[int, ...]] = set()
"""APR files of this process whose every byte agreed with their checksum, by device, inode, size and times."""


@dataclass(frozen=True)
class ModelFiles:
    """A model that was looked at and found sound, as far as config and headers tell."""

    directory: Path
    config: dict[str, Any]
    """`config.json`, untouched; of an APR file what its metadata says, as such a file would have it."""
    weights: list[Path]
    """The safetensors files, in order, or the APR file; empty when the weights were not asked for."""
    index: Path | None
    """`model.safetensors.index.json`, when the weights are sharded."""
    model_type: str
    architecture: str | None
    """The first of `architectures`."""
    vocab_size: int
    """Rows of the head by `config.json`."""
    hidden_size: int
    layers: int
    tied: bool
    """Whether `config.json` says that head and embedding share their matrix (without the key: no head is stored)."""
    parameters: int
    """Elements over all stored tensors; 0 when the weights were not asked for."""
    total_bytes: int
    """Bytes of the weight files."""
    tokenizer_dir: Path | None
    """The directory itself when it holds a `tokenizer.json`."""
    container: Path | None = None
    """The APR file that holds configuration and weights; `directory` is then where it lies, with its tokenizer."""

    @property
    def place(self) -> Path:
        """What messages name: the directory, or the APR file."""
        return self.container or self.directory

    @property
    def config_files(self) -> list[Path]:
        """`config.json`; nothing for an APR file, which says it itself."""
        return [] if self.container is not None else [self.directory / "config.json"]


def resolve_builtin(path: str) -> Path:
    """Turn `builtin:teacher` or `builtin:student` into the packaged directory; any other text is a path.

    Raises:
        ModelError: there is no built-in model of that name.
    """
    if not path.startswith("builtin:"):
        return Path(path)
    name = path.removeprefix("builtin:")
    if name not in BUILTINS:
        known = " or ".join(f"builtin:{known}" for known in BUILTINS)
        raise ModelError(f"{say(path)}: no such built-in model", expected=f"{known}, a directory, or an APR file")
    return ASSETS / name


def inspect_model_dir(path: Path, role: Role, need_weights: bool = True) -> ModelFiles:
    """Look at a Hugging Face directory (`config.json`, the weights' headers, the tokenizer's place) or at an APR file.

    Of an APR file every byte is read, for the checksum at its end; once a process, unless it was changed since.

    Args:
        path: the directory, or an APR file with its tokenizer beside it.
        role: how messages call the model.
        need_weights: False for a model that starts from random weights: `config.json` is enough.

    Raises:
        ModelError: the directory cannot be used; the message says which file, what was expected and what to do.
    """
    try:
        return _inspect(path, role, need_weights)
    except OSError as error:
        raise unreadable(path, error) from error


def same_files(one: ModelFiles, other: ModelFiles) -> bool:
    """Whether two models' weight files hold the same bytes, under whatever names; unequal ones differ early.

    The same weights can also stand in other files, in shards or another precision: only a loaded model tells that.

    Raises:
        ModelError: a file cannot be read.
    """
    if not one.weights or len(one.weights) != len(other.weights):
        return False
    try:
        return all(
            first.samefile(second) or (first.stat().st_size == second.stat().st_size and cmp(first, second, False))
            for first, second in zip(one.weights, other.weights, strict=True)
        )
    except OSError as error:
        raise unreadable(one.directory, error) from error


def read_tensors(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a weights file by name, of an APR or a safetensors file; see `ModelFiles.weights`.

    Raises:
        ModelError: it is neither, or its header or index is not sound.
    """
    if identify(path) is Format.APR:
        return read_apr(path).tensors
    return read_safetensors_header(path)


def _inspect(path: Path, role: Role, need_weights: bool) -> ModelFiles:
    if path.is_file() and identify(path) is Format.APR:
        return _inspect_apr(path, role, need_weights)
    _require_directory(path, role)
    config_file = path / "config.json"
    if not config_file.exists():
        raise ModelError(
            f"{role} {say(path)}: the directory has no config.json{_also_there(path)}",
            expected="a Hugging Face model directory",
            do="give the directory that holds config.json, the weights and the tokenizer, or an APR file itself",
        )
    config = read_json(config_file, CONFIG_CAP)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(
            f"{say(config_file)}: no model_type",
            expected='the architecture by name, for example "model_type": "qwen2"',
            do="take the config.json that belongs to these weights",
        )
    _refuse_unusable(path, config_file, config, role)
    weights: list[Path] = []
    index: Path | None = None
    tensors: dict[str, TensorEntry] = {}
    if need_weights:
        weights, index, places = _find_weights(path, role)
        tensors = _read_all_headers(weights, index, places)
    return _found(path, config_file, config, tensors, weights, index, None)


def _inspect_apr(path: Path, role: Role, need_weights: bool) -> ModelFiles:
    apr = read_apr(path)
    status = path.stat()
    seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if seen not in _WHOLE:
        require_whole(path)
        if time.time_ns() - status.st_mtime_ns > RACY_NS:
            _WHOLE.add(seen)
    config = config_of(apr)
    _refuse_unusable(path, path, config, role)
    return _found(
        path.parent, path, config, apr.tensors if need_weights else {}, [path] if need_weights else [], None, path
    )


def _found(
    directory: Path,
    config_file: Path,
    config: dict[str, Any],
    tensors: Mapping[str, TensorEntry],
    weights: list[Path],
    index: Path | None,
    container: Path | None,
) -> ModelFiles:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    tied = config.get("tie_word_embeddings")
    return ModelFiles(
        directory=directory,
        config=config,
        weights=weights,
        index=index,
        model_type=clean(config["model_type"], 128),
        architecture=clean(first, 128) if isinstance(first, str) else None,
        vocab_size=_dimension(config, config_file, "vocab_size", "n_vocab", "padded_vocab_size"),
        hidden_size=_dimension(config, config_file, "hidden_size", "n_embd", "d_model", "n_embed", "dim", "model_dim"),
        layers=_dimension(
            config,
            config_file,
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "num_blocks",
        ),
        tied=tied if isinstance(tied, bool) else bool(tensors) and not _has_head(tensors),
        parameters=sum(math.prod(entry.shape) for entry in tensors.values()),
        total_bytes=sum(file.stat().st_size for file in weights),
        tokenizer_dir=directory if (directory / "tokenizer.json").is_file() else None,
        container=container,
    )


def _require_directory(path: Path, role: Role) -> None:
    if path.is_dir():
        return
    if not path.exists():
        raise ModelError(
            f"{role} {say(path)}: no such directory",
            expected="a Hugging Face model directory, or an APR file",
            do="check the path",
        )
    found = identify(path)
    if found is not Format.SAFETENSORS:
        refuse(path, found, role)
    raise ModelError(
        f"{role} {say(path)}: a safetensors file",
        expected="the directory that holds it, with its config.json",
        do=f"give {say(path.parent)}",
    )


def _refuse_unusable(path: Path, config_file: Path, config: Mapping[str, Any], role: Role) -> None:
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"{role} {say(path)}: holds adapter_config.json: a LoRA or other adapter, which stands on another model",
            expected="a whole model",
            do="merge the adapter into its base model (merge_and_unload) and save that",
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{role} {say(config_file)}: quantised weights (quantization_config: {say(method or 'unnamed')})",
            expected="float32, bfloat16 or float16 weights",
            do="take the model's unquantised version",
        )


def _find_weights(path: Path, role: Role) -> tuple[list[Path], Path | None, dict[str, str]]:
    """The safetensors files; for sharded weights also the index, and the file name by tensor that it gives."""
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.exists():
        return [single], None, {}
    if index.exists():
        places = _read_index(path, index)
        return [path / name for name in sorted(set(places.values()))], index, places
    for candidate in sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")) + sorted(path.glob("*.pth")):
        found = identify(candidate)
        if found in (Format.PICKLE, Format.TORCH):
            refuse(candidate, found, role)
    raise ModelError(
        f"{role} {say(path)}: the directory has no weights{_also_there(path)}",
        expected=f"{SINGLE_FILE}, or {INDEX_FILE} with its shards",
        do="download or export the weights; for a random start give student: {path: DIR, init: random}",
    )


def _read_index(path: Path, index: Path) -> dict[str, str]:
    weight_map = read_json(index, INDEX_CAP, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(
            f"{say(index)}: no weight_map", expected="an object from tensor name to file name", do=DOWNLOAD
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not name or name in (".", "..") or any(char in name for char in "/\\\0:"):
            raise ModelError(
                f"{say(index)}: names the file {say(name)!r}, outside of its directory",
                expected="plain file names of the same directory",
                do="do not use this model: its index was tampered with, or is broken",
            )
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise ModelError(
            f"{say(index)}: {len(missing)} of {len(names)} shards are missing, the first is {say(missing[0])}",
            expected="every file that the index names",
            do="finish the download",
        )
    return weight_map


def _read_all_headers(weights: list[Path], index: Path | None, places: Mapping[str, str]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    found: dict[str, str] = {}
    for file in weights:
        for name, entry in read_safetensors_header(file).items():
            if name in tensors:
                raise ModelError(
                    f"{say(file)}: tensor {say(name)} stands in {say(found[name])} too",
                    expected="each tensor once",
                    do="download or export all shards again",
                )
            tensors[name], found[name] = entry, file.name
    wrong = sorted(name for name, place in places.items() if found.get(name) != place)
    if wrong and index is not None:
        first = wrong[0]
        raise ModelError(
            f"{say(index)}: {len(wrong)} of {len(places)} tensors are not where it says, the first is {say(first)}: "
            f"in {say(found.get(first, 'no shard'))} and not in {say(places[first])}",
            expected="an index and shards of the same export",
            do="download or export all of them again",
        )
    return tensors


def _dimension(config: Mapping[str, Any], file: Path, *names: str) -> int:
    # Multi-modal configs keep the language model's numbers one level down.
    for part in (config, config.get("text_config"), config.get("decoder")):
        if not isinstance(part, dict):
            continue
        for name in names:
            if (value := part.get(name)) is None:
                continue
            if not is_count(value) or not 0 < value < 2**31:
                raise ModelError(f"{say(file)}: {name}: {say(value)}", expected="a positive integer")
            return int(value)
    raise ModelError(
        f"{say(file)}: no {names[0]}",
        expected=f"{names[0]} (or {', '.join(names[1:])})",
        do="take the config.json that belongs to these weights",
    )


def _has_head(tensors: Mapping[str, TensorEntry]) -> bool:
    return any(name.endswith(("lm_head.weight", "embed_out.weight", "output.weight")) for name in tensors)


def _also_there(path: Path) -> str:
    """Name one model file of another name or format that stands in the directory, as a hint."""
    for file in sorted(path.iterdir())[:1000]:
        if file.is_file() and os.access(file, os.R_OK):
            found = identify(file)
            if found in (Format.APR, Format.GGUF, Format.PICKLE, Format.TORCH, Format.SAFETENSORS):
                return f" ({say(file.name)} in it is {found.value})"
    return ""
