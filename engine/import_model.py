"""An existing model made into a directory that a run can take as its teacher: read, written, read back, then named.

Neither torch nor transformers is imported here: what reads the file runs in processes of its own
(`engine.import_stage`), one after the other, so that memory is taken once and given back. All is written beside the
directory that it is for, and gets its name when everything held.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from engine.durable import discard, sync_directory
from engine.errors import KdError, ModelError
from engine.formats import INDEX_FILE, ModelFiles, inspect_model_dir
from engine.gguf_file import GgufFacts
from engine.import_card import licence_of, model_card
from engine.sniff import Format, identify, read_json, read_safetensors_header, refuse, say, unreadable
from engine.vitals import proc_bytes
from engine.workplace import workplace

SCHEMA: Final = "kdconsole.import/1"
RECORD: Final = "import.json"
Dtype = Literal["auto", "bf16", "fp32"]

LOOK_SECONDS: Final = 300.0
_BYTES: Final = {"bf16": 2, "fp32": 4}
_SMALL_FILES: Final = 64 << 20
"""For tokenizer and reference."""
_PROCESS: Final = 1 << 30
"""What PyTorch and transformers take by themselves."""
_RECORD_CAP: Final = 1 << 20
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
_PACKAGES: Final = ("kdconsole", "torch", "transformers", "gguf")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    source: Path
    """A GGUF file, or a Hugging Face directory."""
    target: Path
    """The directory to be."""
    name: str | None = None
    """What the model card calls it; None: what the source calls itself."""
    dtype: Dtype = "auto"
    """Of the weights on disk; auto: bfloat16, but float32 for a source whose matrices are float16 or float32."""
    package: str | None = None
    """The package and version that the file came with."""
    untrained: bool = False
    """Take a model that does not predict text."""
    force: bool = False
    """Write it again in place of another import."""


@dataclass(frozen=True)
class Imported:
    """A directory that holds the model, whole and verified."""

    path: Path
    record: dict[str, Any]
    """What stands in its `import.json`."""
    already: bool
    """Whether it stood there before."""


def import_model(request: Request, tell: Tell = lambda text: None) -> Imported:
    """Make the directory; leaves nothing behind where it cannot.

    Args:
        request: what is asked for.
        tell: takes what is being done, as one line.

    Raises:
        KdError: the source is no such model, it does not fit here, what was written is not it, or the target is taken.
    """
    source, target = _absolute(request.source), _absolute(request.target)
    _require_place(target)
    files = _sound_source(source)
    tell(f"reading {say(source.name)}")
    try:
        digest = _digest(source, files)
        if there := _there_already(request, target, digest):
            return Imported(target, there, already=True)
        facts = None
        if files is None:
            found = _stage("look", {"source": str(source)}, tell, LOOK_SECONDS)
            facts = msgspec.convert(found, GgufFacts)
        dtype = _dtype(request.dtype, files, facts)
        values = files.parameters if files is not None else facts.values if facts is not None else 0
        _require_room(target, values, dtype)
        with workplace(target, "import") as partial:
            asked = {"source": str(source), "partial": str(partial), "untrained": request.untrained}
            written = _stage("write", {**asked, "dtype": dtype, "gguf": facts is not None}, tell)
            checked = _stage("check", {**asked, "facts": None if facts is None else msgspec.to_builtins(facts)}, tell)
            discard(partial / ".reference.safetensors")
            record = {
                "schema": SCHEMA,
                "name": request.name or (facts.name if facts else "") or source.stem,
                "asked": {"name": request.name, "dtype": request.dtype},
                "source": {
                    "path": str(source),
                    "package": request.package,
                    "format": "GGUF" if facts else "safetensors",
                    "bytes": source.stat().st_size if files is None else files.total_bytes,
                    "sha256": digest,
                    "states": _stated(source, files, facts),
                },
                "dtype": dtype,
                **written,
                **checked,
                "versions": _versions(),
            }
            (partial / "README.md").write_text(model_card(record), encoding="utf-8")
            record["files"] = {each.name: _sha256(each) for each in sorted(partial.iterdir())}
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            inspect_model_dir(partial, "teacher")
            _commit(partial, target)
    except OSError as error:
        raise ModelError(
            f"{say(error.filename or target)}: {error.strerror or error}",
            do="nothing was kept; make room, or choose another DIR",
        ) from error
    return Imported(target, record, already=False)


def _absolute(path: Path) -> Path:
    # normpath and not resolve: a link to a model keeps the name under which it is known.
    return Path(os.path.normpath(Path.cwd() / os.path.expanduser(path)))


def _require_place(target: Path) -> None:
    if not target.parent.is_dir():
        raise ModelError(
            f"{say(target)}: {say(target.parent)} is no directory", expected="a directory to make it in", do="mkdir -p"
        )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ModelError(f"{say(target)}: is there and no directory", expected="a name that is free")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ModelError(
            f"{say(target.parent)}: not writable", expected="a directory that you may write to", do="choose another DIR"
        )


def _sound_source(source: Path) -> ModelFiles | None:
    """The directory's files, or None for a GGUF file."""
    if source.is_dir():
        return inspect_model_dir(source, "teacher")
    found = identify(source)
    if found is Format.SAFETENSORS:
        raise ModelError(
            f"{say(source)}: a safetensors file",
            expected="a GGUF file, or the directory that holds this one, with its config.json",
            do=f"give {say(source.parent)}",
        )
    if found is not Format.GGUF:
        refuse(source, found)
    return None


def _digest(source: Path, files: ModelFiles | None) -> str:
    """SHA-256 of a file; of a directory, of the lines `SHA256  NAME` of what makes the model."""
    if files is None:
        return _sha256(source)
    names = ["config.json", "generation_config.json", INDEX_FILE, *_TOKENIZERS, *(file.name for file in files.weights)]
    lines = [f"{_sha256(source / name)}  {name}\n" for name in sorted(set(names)) if (source / name).is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _there_already(request: Request, target: Path, digest: str) -> dict[str, Any] | None:
    """The record of the same import that stands there, whole; None where the place is free or may be taken.

    Raises:
        ModelError: something else stands there.
    """
    if not target.exists() or not any(target.iterdir()):
        return None
    record = read_json(target / RECORD, _RECORD_CAP) if (target / RECORD).is_file() else {}
    files = record.get("files")
    if record.get("schema") != SCHEMA or not isinstance(files, dict):
        raise ModelError(
            f"{say(target)}: holds something that is no import", expected="a directory to be made", do="choose another"
        )
    if strange := sorted({each.name for each in target.iterdir()} - set(files) - {RECORD}):
        raise ModelError(
            f"{say(target)}: holds {say(strange[0])}, which no import put there",
            expected="an import and nothing else",
            do="move it away, or choose another DIR",
        )
    if request.force:
        return None
    asked = {"name": request.name, "dtype": request.dtype}
    if record.get("source", {}).get("sha256") != digest or record.get("asked") != asked:
        raise ModelError(
            f"{say(target)}: holds the import of {say(record.get('source', {}).get('path'))}, with other options or of "
            "another file",
            expected="the same import, or a free place",
            do="--force writes it again, or choose another DIR",
        )
    changed = [name for name, told in files.items() if not (target / name).is_file() or _sha256(target / name) != told]
    if changed:
        raise ModelError(
            f"{say(target)}: {say(changed[0])} is not what the import wrote",
            expected="files as import.json has them",
            do="--force writes it again",
        )
    return record


def _dtype(asked: Dtype, files: ModelFiles | None, facts: GgufFacts | None) -> str:
    if asked != "auto":
        return asked
    if facts is not None:
        return "fp32" if facts.matrices_are_floats else "bf16"
    weights = files.weights if files is not None else []
    held = {entry.dtype for file in weights for entry in read_safetensors_header(file).values()}
    return "bf16" if held <= {"BF16"} else "fp32"


def _require_room(target: Path, values: int, dtype: str) -> None:
    size = values * _BYTES[dtype] + _SMALL_FILES
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise ModelError(
            f"{say(target.parent)}: {size:,} bytes are needed on that disk and {free:,} are free",
            expected="room for the model",
            do="make room, or choose a DIR on another disk",
        )
    # The weights as stored, and in float32 as they are read back and computed with.
    memory = values * (_BYTES[dtype] + 4) + _PROCESS
    available = proc_bytes("/proc/meminfo", "MemAvailable")
    if available is not None and memory > available:
        raise ModelError(
            f"importing {values:,} values takes {memory:,} bytes of memory and {available:,} are free",
            expected="memory for the model in float32",
            do="import it on a larger machine and copy the directory",
        )


def _commit(partial: Path, target: Path) -> None:
    for file in partial.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_directory(partial)
    retired = target.with_name(f".{target.name}.old")
    discard(retired)
    if target.exists():
        os.rename(target, retired)
    os.rename(partial, target)
    sync_directory(target.parent)
    discard(retired)


def _stated(source: Path, files: ModelFiles | None, facts: GgufFacts | None) -> dict[str, Any]:
    """What the source says of itself, unproven."""
    if facts is not None:
        return {
            "architecture": facts.architecture,
            "name": facts.name,
            "organization": facts.organization,
            "licence": facts.licence,
            "tensors": facts.types,
            "values": facts.values,
            "vocabulary": facts.vocabulary,
        }
    return {
        "architecture": files.model_type if files else "",
        "licence": licence_of(source / "README.md"),
        "values": files.parameters if files else 0,
        "vocabulary": files.vocab_size if files else 0,
    }


def _versions() -> dict[str, str]:
    told = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            told[package] = version(package)
    return told


def _stage(name: str, asked: dict[str, Any], tell: Tell, seconds: float | None = None) -> dict[str, Any]:
    """One process of `engine.import_stage`; it ends with this function, however that ends."""
    home = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-P", "-m", "engine.import_stage", name]
    answer: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as errors,
        # A session of its own: Ctrl-C comes here, and here it is decided that the process ends.
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
            text=True,
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        timer = threading.Timer(seconds or 0, child.kill)
        try:
            if seconds is not None:
                timer.start()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(asked))
                child.stdin.close()
            for line in child.stdout:
                with contextlib.suppress(ValueError):
                    answer = json.loads(line)
                if "tell" in answer:
                    tell(str(answer["tell"]))
        finally:
            timer.cancel()
            if child.poll() is None and "done" not in answer and "error" not in answer:
                child.kill()
            child.wait()
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:] or [""]
    if "error" in answer:
        raise KdError(str(answer["error"]))
    done = answer.get("done")
    if not isinstance(done, dict):
        killed = " (the kernel ends a process so where memory runs out)" if child.returncode == -9 else ""
        raise ModelError(
            f"the process that was to {name} the model ended with {child.returncode}{killed}: {say(last[0])[:300]}",
            expected="an answer",
            do="KDCONSOLE_DEBUG=1 shows more" if last[0] else "try again where more memory is free",
        )
    return done
