"""Checkpoints and the exported model, as far as they are here: every byte of them, and what the stream says of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from console.verify.claims import Claim, differs, same, untold
from console.verify.fold import Fold, Saved
from console.verify.manifest import allowed_changes
from dispatch.manifest import Manifest as RunManifest
from dispatch.sums import Progress, sha256_told
from engine.checkpoint import (
    DIRECTORY,
    LATEST,
    MODEL,
    CheckpointError,
    FileRow,
    Manifest,
    TensorRow,
    committed,
    directory_name,
    read_manifest,
    step_of,
)
from engine.errors import ModelError, RunError
from engine.formats import inspect_model_dir
from engine.sniff import read_safetensors_header
from engine.text import clean

PART = "weights"
_LATEST_BYTES = 256


def weight_claims(
    directory: Path,
    manifest: RunManifest | None,
    fold: Fold | None,
    hashes: Mapping[str, str],
    progress: Progress,
) -> Iterator[Claim]:
    """What is here of a run's weights.

    Args:
        directory: of the run.
        manifest: its own; None where it cannot be read.
        fold: of the whole stream; None where there is none.
        hashes: of files that were read already, by name.
        progress: told what is read besides.
    """
    root = directory / DIRECTORY
    found: dict[int, Manifest] = {}
    try:
        if os.path.lexists(root) and not stat.S_ISDIR(os.lstat(root).st_mode):
            yield differs(PART, DIRECTORY, "a directory", "something else", f"{DIRECTORY} is no directory")
            return
        there = sorted(committed(directory))
    except (CheckpointError, OSError) as error:
        yield differs(PART, DIRECTORY, "a directory", "cannot be read", str(error))
        return
    for path in there:
        name = f"{DIRECTORY}/{path.name}"
        try:
            found[step_of(path.name) or 0] = whole = _verified(path, name, manifest, hashes, progress)
        except (CheckpointError, ModelError, OSError) as error:
            yield differs(PART, name, "a whole checkpoint", "damaged", _short(error, directory))
            continue
        yield same(PART, name, f"{whole.tensors:,} tensors, {whole.bytes:,} bytes", why="as its manifest has it")
        yield from _against_run(name, whole, manifest, allowed_changes(directory))
        yield from _against_stream(name, whole, fold)
    if there:
        yield _latest(root)
        yield from _last_saved(fold, there)
    yield from _model(directory, found)


def _verified(
    path: Path, name: str, manifest: RunManifest | None, hashes: Mapping[str, str], progress: Progress
) -> Manifest:
    """As `engine.checkpoint.verify`, but what was hashed already is not read once more, and it tells how far it is."""
    whole = read_manifest(path, None if manifest is None else manifest.run)
    for each, row in whole.files.items():
        _check(path / each, row, hashes.get(f"{name}/{each}"), f"{name}/{each}", progress)
    return whole


def _check(file: Path, row: FileRow, digest: str | None, name: str, progress: Progress) -> None:
    status = os.lstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name}: not a regular file")
    if status.st_size != row.bytes:
        raise CheckpointError(f"{name}: {status.st_size:,} bytes", expected=f"{row.bytes:,} by its manifest")
    digest = digest or sha256_told(file, name, progress)
    if digest != row.sha256:
        raise CheckpointError(f"{name}: SHA-256 {digest}", expected=f"{row.sha256} by its manifest")
    stored = {
        tensor: TensorRow(dtype=entry.dtype, shape=entry.shape, bytes=entry.end - entry.begin)
        for tensor, entry in read_safetensors_header(file).items()
    }
    if stored != row.tensors:
        first = min(each for each in {**stored, **row.tensors} if stored.get(each) != row.tensors.get(each))
        raise CheckpointError(f"{name}: tensor {clean(first, 200)} is not as its manifest has it")


def _against_run(name: str, whole: Manifest, manifest: RunManifest | None, allowed: frozenset[str]) -> Iterator[Claim]:
    """What the run was made from, as the checkpoint noted it."""
    if manifest is None:
        return
    wanted = {"config": manifest.config_fingerprint, **manifest.inputs}
    for key in ("config", "teacher", "tokenizer", "data"):
        stated, found = whole.state.digests.get(key), wanted.get(key)
        if stated is not None and found is not None and stated != found:
            if key in allowed:
                yield untold(PART, f"{name}: {key}", stated, f"{found} now, which resume.json allows")
            else:
                yield differs(PART, f"{name}: {key}", stated, found, f"{name}: made from another {key}")


def _against_stream(name: str, whole: Manifest, fold: Fold | None) -> Iterator[Claim]:
    if fold is None:
        return
    saved = fold.saved.get(whole.step)
    if saved is None:
        why = "no event speaks of it: its process was killed right after it was written, or the event is missing"
        yield untold(PART, f"{name}: event", "none", why)
        return
    event = saved.event
    wanted: dict[str, tuple[object, object]] = {
        "path": (event.path, name),
        "bytes": (event.bytes, whole.bytes),
        "tensors": (event.tensors, whole.tensors),
        "sha256": (event.sha256, whole.files[MODEL].sha256),
        **_training(whole, saved),
    }
    different = {field: pair for field, pair in wanted.items() if pair[0] != pair[1]}
    if not different:
        yield same(PART, f"{name}: event", f"seq {event.seq}: {', '.join(wanted)}", "the same")
    for field, (stated, there) in different.items():
        why = f"events.jsonl line {saved.line}, seq {event.seq}: {field}"
        yield differs(PART, f"{name}: {field}", stated, there, why)


def _training(whole: Manifest, saved: Saved) -> dict[str, tuple[object, object]]:
    """How far training had come, as the checkpoint noted it and as the steps make it."""
    state = whole.state
    if saved.loss is None or saved.tokens is None or state.attempt != saved.attempt:
        return {}
    pairs: dict[str, tuple[object, object]] = {"tokens": (state.tokens, int(saved.tokens))}
    if state.final_loss is not None:
        pairs["loss"] = (state.final_loss, saved.loss)
    return pairs


def _latest(root: Path) -> Claim:
    """The pointer to the newest one, which is for people and tools."""
    name, path = f"{DIRECTORY}/{LATEST}", root / LATEST
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return differs(PART, name, "a checkpoint that is here", "no regular file", name)
        with path.open("rb") as file:
            pointed = clean(file.read(_LATEST_BYTES).decode("utf-8", "replace").removesuffix("\n"), 100)
    except FileNotFoundError:
        return untold(PART, name, "", "there is none: a crash between a checkpoint and its pointer leaves it so")
    except OSError as error:
        return differs(PART, name, "a checkpoint that is here", "cannot be read", f"{name}: {error.strerror}")
    if step_of(pointed) is None:
        return differs(PART, name, pointed, "no checkpoint's name", name)
    if not (root / pointed).is_dir():
        return differs(PART, name, pointed, "is not here", f"{name} points to {pointed}")
    return same(PART, name, pointed, "is here")


def _last_saved(fold: Fold | None, there: list[Path]) -> Iterator[Claim]:
    """The newest checkpoint of the stream is never dropped; where others are here and it is not, that is told."""
    saved = {} if fold is None else fold.saved
    newest = max(saved.values(), key=lambda each: each.event.seq, default=None)
    if newest is not None and directory_name(newest.event.step) not in {path.name for path in there}:
        yield untold(PART, f"checkpoint of step {newest.event.step}", newest.event.sha256, "absent, others are here")


def _model(directory: Path, checkpoints: Mapping[int, Manifest]) -> Iterator[Claim]:
    """The exported model: it can be read as one, and has the tensors of the checkpoint that it was made of."""
    path = directory / "model"
    try:
        if not os.path.lexists(path):
            return
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise ModelError("model: no directory")
        if strange := [each.name for each in path.iterdir() if not stat.S_ISREG(os.lstat(each).st_mode)]:
            raise ModelError(f"model/{clean(strange[0], 100)}: not a regular file")
        files = inspect_model_dir(path, "student")
        stored = {
            name: entry.shape for shard in files.weights for name, entry in read_safetensors_header(shard).items()
        }
    except (ModelError, RunError, OSError) as error:
        yield differs(PART, "model", "a model that can be loaded", "none", _short(error, directory))
        return
    yield same(PART, "model", f"{len(stored):,} tensors, {files.total_bytes:,} bytes", why="whole by its headers")
    final = [whole for whole in checkpoints.values() if "final" in whole.kinds]
    if not final:
        yield untold(PART, "model: tensors", "those of the final checkpoint", "the final checkpoint is not here")
        return
    trained = {name: row.shape for name, row in final[-1].files[MODEL].tensors.items()}
    wrong = sorted(name for name in trained if stored.get(name) != trained[name])
    claim = f"model: tensors of step {final[-1].step}"
    if wrong:
        shown = stored.get(wrong[0])
        found = "missing" if shown is None else f"shape {list(shown)}"
        why = f"model: tensor {clean(wrong[0], 200)} is {found}, the checkpoint has shape {list(trained[wrong[0]])}"
        yield differs(PART, claim, f"{len(trained):,} tensors", f"{len(wrong):,} missing or of another shape", why)
    else:
        yield same(PART, claim, f"{len(trained):,} names and shapes", "the same")


def _short(error: Exception, directory: Path) -> str:
    """An error without the path of the directory: every row is of the same one."""
    if isinstance(error, OSError):
        return f"{Path(error.filename or '').name}: {error.strerror}"
    return str(error).replace(f"{directory}/", "")
