"""Weights from one container to the other: an APR file made a Hugging Face directory, or such a directory an APR file.

Neither torch nor transformers is imported. Tensors go through one at a time. What is written is read back, and each
tensor's bytes are computed once more from the source and compared, before anything gets its name.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from engine.apr import COMPANIONS
from engine.apr_model import EMBEDDING, HEAD, dominant
from engine.apr_values import Values, converted
from engine.apr_writer import Outlines, metadata_of, require_known, write_apr
from engine.durable import sync_directory, write_new
from engine.errors import KdError, ModelError
from engine.formats import HEADER_CAP, SINGLE_FILE, ModelFiles, inspect_model_dir, read_tensors, resolve_builtin
from engine.sniff import TensorEntry, say
from engine.weight_source import Weights, open_weights
from engine.workplace import workplace

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Tell = Callable[[str], None]

STORED: Final = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_ITEM: Final = {"F32": 4, "F16": 2, "BF16": 2}
_SMALL_FILES: Final = 64 << 20
_IGNORED: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Keys of a configuration that say nothing of what the model computes."""


@dataclass(frozen=True)
class Converted:
    """What was made, whole and read back."""

    path: Path
    kind: Literal["apr", "directory"]
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    """Dtype to number of tensors, as written."""
    total_bytes: int
    """Of the weights' file."""
    sha256: str
    """Of the weights' file."""
    files: tuple[str, ...]
    """Everything that was written, by name."""


def source_of(text: str) -> Path:
    """What an operator gives as a source: the path of a directory or an APR file, or `builtin:teacher`.

    Raises:
        ModelError: no built-in model of that name, or one that has no weights.
    """
    if text == "builtin:student":
        raise ModelError(
            f"{text}: has no weights to convert: a run gives it random ones when it starts",
            expected="builtin:teacher, a model's directory, or an APR file",
            do="train it, and convert the model that the run exported",
        )
    return resolve_builtin(text)


def convert(source: Path, target: Path, dtype: Dtype = "auto", tell: Tell = lambda text: None) -> Converted:
    """Make the other container of a model; leaves nothing behind where it cannot.

    Args:
        source: an APR file, or a Hugging Face directory.
        target: the directory or the APR file to be; nothing may stand there. An APR file's own directory is made with
            it if it is not there; its tokenizer comes to stand beside it.
        dtype: of the tensors on disk; auto: each as it is stored, float32 for float64 and for quantised ones.
        tell: takes what is being done, as one line.

    Raises:
        KdError: the source is no such model, what was written is not it, or the target is taken.
    """
    source, target = _absolute(source), _absolute(target)
    require_free(target)
    tell(f"reading {say(source.name)}")
    files = inspect_model_dir(source, "teacher")
    weights = open_weights(files)
    if files.container is None:
        require_known(files.config, source)
    outlines = _outlines(weights, files, dtype)
    written = sum(math.prod(shape) * _ITEM[kind] for kind, shape in outlines.values())
    _require_room(target, written)
    metadata = metadata_of(files.config, outlines, source)
    make = _make_directory if files.container is not None else _make_apr
    try:
        return make(files, weights, outlines, metadata, target, tell)
    except OSError as error:
        raise ModelError(
            f"{say(error.filename or target)}: {error.strerror or error}",
            do="nothing was kept; make room, or choose another place",
        ) from error


def written_bytes(weights: Weights, name: str, dtype: str) -> bytes:
    """A tensor's bytes as they are written: little-endian, row by row.

    Raises:
        ModelError: the tensor cannot be read, or a value is too large for the dtype.
    """
    try:
        values: Values = converted(weights.values(name), dtype)
    except KdError as error:
        raise ModelError(f"tensor {say(name)}: {error}") from None
    return values.array.tobytes()


def _make_directory(
    files: ModelFiles, weights: Weights, outlines: Outlines, metadata: dict[str, Any], target: Path, tell: Tell
) -> Converted:
    with workplace(target, "conversion") as partial:
        companions = _copy_companions(files.directory, partial)
        config = files.config | {"dtype": _dtype_name(outlines)}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_new(partial / "config.json", [text.encode()])
        tell(f"writing {len(outlines):,} tensors")
        made = partial / SINGLE_FILE
        sha256 = write_new(made, _safetensors(outlines, weights))
        tell("reading back")
        back = inspect_model_dir(partial, "teacher")
        _require_same(back, outlines, weights, config)
        result = _told(target, "directory", made, outlines, sha256, (*companions, "config.json", SINGLE_FILE))
        sync_directory(partial)
        os.rename(partial, target)
        sync_directory(target.parent)
        return result


def _make_apr(
    files: ModelFiles, weights: Weights, outlines: Outlines, metadata: dict[str, Any], target: Path, tell: Tell
) -> Converted:
    new = not target.parent.exists()
    # Beside other files the weights come last: where the APR file stands, its tokenizer does.
    with workplace(target.parent if new else target, "conversion") as partial:
        companions = _copy_companions(files.directory, partial)
        if not new:
            _require_same_companions(partial, target, companions)
        tell(f"writing {len(outlines):,} tensors")
        made = partial / target.name
        sha256 = write_apr(made, metadata, outlines, lambda name: written_bytes(weights, name, outlines[name][0]))
        tell("reading back")
        _require_same(inspect_model_dir(made, "teacher"), outlines, weights, files.config)
        result = _told(target, "apr", made, outlines, sha256, (*companions, target.name))
        if new:
            sync_directory(partial)
            os.rename(partial, target.parent)
            sync_directory(target.parent.parent)
            return result
        placed = []
        try:
            for name in companions:
                if not (target.parent / name).exists():
                    placed.append(target.parent / name)
                    os.rename(partial / name, target.parent / name)
            require_free(target)  # of what came meanwhile
            os.rename(made, target)
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)
        return result


def _outlines(weights: Weights, files: ModelFiles, dtype: Dtype) -> Outlines:
    names = dict(weights.tensors)
    if files.container is None and EMBEDDING not in names:
        raise ModelError(
            f"{say(files.directory)}: has no tensor {EMBEDDING}",
            expected="a whole causal language model, its tensors named as Hugging Face does",
            do="take the model's own files",
        )
    if files.container is None and HEAD in names and files.config.get("tie_word_embeddings") is True:
        _require_tied(weights, files)
        del names[HEAD]  # transformers takes the embedding, whatever stands there
    if files.container is None and HEAD not in names and files.config.get("tie_word_embeddings") is not True:
        raise ModelError(
            f"{say(files.directory)}: has no {HEAD}, and config.json does not say that it is the embedding",
            expected="tie_word_embeddings: true, or a head",
            do="take the config.json that belongs to these weights",
        )
    return {name: (_target_dtype(entry, dtype), tuple(entry.shape)) for name, entry in names.items()}


def _target_dtype(entry: TensorEntry, dtype: Dtype) -> str:
    if dtype != "auto":
        return STORED[dtype]
    return entry.dtype if entry.dtype in _ITEM else "F32"


def _require_tied(weights: Weights, files: ModelFiles) -> None:
    head, embedding = weights.values(HEAD), weights.values(EMBEDDING)
    if head.dtype != embedding.dtype or head.array.tobytes() != embedding.array.tobytes():
        raise ModelError(
            f"{say(files.directory)}: config.json says that {HEAD} is the embedding, and its weights hold another",
            expected="one matrix, or tie_word_embeddings: false",
            do="take the config.json that belongs to these weights",
        )


def _require_same(back: ModelFiles, outlines: Outlines, weights: Weights, config: dict[str, Any]) -> None:
    """That names, dtypes, shapes, bytes and configuration on the disk are what was to be written."""
    found = open_weights(back)
    stored = {name: (entry.dtype, tuple(entry.shape)) for name, entry in found.tensors.items()}
    wrong = [name for name in outlines.keys() | stored.keys() if outlines.get(name) != stored.get(name)]
    wrong += [
        name
        for name, (dtype, _) in outlines.items()
        if name not in wrong and found.values(name).array.tobytes() != written_bytes(weights, name, dtype)
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong):,} of {len(outlines):,} tensors were not written as they are, the first is {say(min(wrong))}",
            do="nothing was kept; check disk and memory, and try again",
        )
    changed = [key for key, value in config.items() if key not in _IGNORED and back.config.get(key) != value]
    if changed:
        raise ModelError(
            f"{say(changed[0])} is {say(config[changed[0]])[:80]} and was read back as "
            f"{say(back.config.get(changed[0]))[:80]}",
            expected="the same configuration",
            do="nothing was kept; take another source of this model",
        )


def _safetensors(outlines: Outlines, weights: Weights) -> Iterator[bytes]:
    """A safetensors file, tensor by tensor; the format's section of https://huggingface.co/docs/safetensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # Wide dtypes first keeps every tensor aligned to its own values, as the format's own writer does.
    names = sorted(outlines, key=lambda name: (-_ITEM[outlines[name][0]], name))
    for name in names:
        dtype, shape = outlines[name]
        size = math.prod(shape) * _ITEM[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_CAP:
        raise ModelError(
            f"{len(outlines):,} tensors: a header of {len(text):,} bytes", expected=f"at most {HEADER_CAP:,}"
        )
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield written_bytes(weights, name, outlines[name][0])


def _dtype_name(outlines: Outlines) -> str:
    return dominant({name: TensorEntry(dtype, shape, 0, 0) for name, (dtype, shape) in outlines.items()})


def _told(
    target: Path,
    kind: Literal["apr", "directory"],
    made: Path,
    outlines: Outlines,
    sha256: str,
    files: tuple[str, ...],
) -> Converted:
    kinds = [dtype for dtype, _ in outlines.values()]
    return Converted(
        path=target,
        kind=kind,
        tensors=len(read_tensors(made)),
        parameters=sum(math.prod(shape) for _, shape in outlines.values()),
        dtypes={dtype: kinds.count(dtype) for dtype in sorted(set(kinds))},
        total_bytes=made.stat().st_size,
        sha256=sha256,
        files=files,
    )


def _copy_companions(source: Path, partial: Path) -> tuple[str, ...]:
    found = tuple(name for name in COMPANIONS if (source / name).is_file())
    for name in found:
        write_new(partial / name, [(source / name).read_bytes()])
    return found


def _require_same_companions(partial: Path, target: Path, companions: tuple[str, ...]) -> None:
    for name in companions:
        there = target.parent / name
        if there.exists() and (not there.is_file() or there.read_bytes() != (partial / name).read_bytes()):
            raise ModelError(
                f"{say(there)}: is there, and is not the one of this model",
                expected="a directory without another model's tokenizer",
                do=f"give a directory of its own: {say(target.parent / target.stem / target.name)}",
            )


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(Path.cwd() / os.path.expanduser(path)))


def require_free(target: Path) -> None:
    """Refuses a place where something stands, or where nothing can be made.

    Raises:
        ModelError: it is one.
    """
    if os.path.lexists(target):
        raise ModelError(f"{say(target)}: is there already", expected="a name that is free", do="choose another")
    holder = target.parent if target.parent.exists() else target.parent.parent
    if not holder.is_dir():
        raise ModelError(
            f"{say(target)}: {say(holder)} is no directory", expected="a place to make it in", do="mkdir -p"
        )
    if not os.access(holder, os.W_OK | os.X_OK):
        raise ModelError(f"{say(holder)}: not writable", expected="a directory that you may write to")


def _require_room(target: Path, written: int) -> None:
    holder = target.parent if target.parent.exists() else target.parent.parent
    free = shutil.disk_usage(holder).free
    if written + _SMALL_FILES > free:
        raise ModelError(
            f"{say(holder)}: {written + _SMALL_FILES:,} bytes are needed on that disk and {free:,} are free",
            expected="room for the model",
            do="make room, or choose a place on another disk",
        )
