"""Looks at the runs of a host and removes them: operations that travel beside `dispatch.host_tool`, see `load` there.

Standard library only. Everything stands below `base`: `runs/RUN`, `store/HASH`, `engine/HASH`. A run's `.lock` is held
by its supervisor and its trainer until the last of them is gone: whoever can take it knows that nothing runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

from dispatch.host_tool import (
    BUSY_SECONDS,
    PART,
    Answer,
    Input,
    Pulse,
    Refused,
    open_below,
    sync_directory,
    whole,
)

SMALL = 1 << 20
TAIL = 256 << 10
MANIFEST_CAP = 64 << 20
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CHECKPOINT = re.compile(r"ckpt-step-[0-9]{6,18}")
HASH = re.compile(r"[0-9a-f]{64}")
DAMAGED = re.compile(r"[0-9a-f]{64}\.damaged-[0-9a-f]+")
REMOVED = re.compile(r"\.removed-[0-9a-f]+")


def op_runs(request: Answer, _: Input) -> Answer:
    """All that stands below `base` -> `runs`, `rest` (what else takes room), `time` here, `free` bytes."""
    base = whole(request["base"])
    names = [name for name in _directories(os.path.join(base, "runs")) if _what("runs", name) is None]
    runs = [_run(os.path.join(base, "runs", name), name) for name in names if RUN_NAME.fullmatch(name)]
    uses = _mentioned(base)
    rest = [each for kind in ("runs", "store", "engine") for each in _rest(base, kind, uses)]
    there = base
    while not os.path.isdir(there) and there != "/":
        there = os.path.dirname(there)
    return {"base": base, "time": time.time(), "free": shutil.disk_usage(there).free, "runs": runs, "rest": rest}


def _directories(path: str) -> list[str]:
    """Real directories in a directory, sorted; names that are no UTF-8 are passed over."""
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name.isprintable())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(root: str, name: str, limit: int = SMALL, tail: bool = False) -> bytes:
    """A regular file's bytes, or its last `limit` ones; b"" where there is none that can be read."""
    try:
        descriptor = open_below(root, name)
    except OSError:
        return b""
    try:
        size = os.fstat(descriptor).st_size
        if size > limit and not tail:
            return b""
        return os.pread(descriptor, limit, max(0, size - limit))
    finally:
        os.close(descriptor)


def _json(raw: bytes) -> Answer:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: object, limit: int = 200) -> str | None:
    return value[:limit] if isinstance(value, str) else None


def _run(path: str, name: str) -> Answer:
    """One run's row."""
    manifest = _json(_read(path, "dispatch.json"))
    maker, created = manifest.get("host"), manifest.get("created_unix")
    files = Sizes(path)
    whole_bytes, step, last = _progress(path)
    found, others = _checkpoints(path)
    model = os.path.join(path, "model")
    real = os.path.isdir(model) and not os.path.islink(model)
    if os.path.lexists(model) and not real:
        others.append("model")
    return {
        "id": name,
        "run": _text(manifest.get("run")),
        "label": _text(manifest.get("name")),
        "mode": _text(manifest.get("mode")),
        "by": _text(maker.get("hostname")) if isinstance(maker, dict) else None,
        "created": created if isinstance(created, int | float) else None,
        "state": state_of(path) if manifest else "unknown",
        "exit": _json(_read(path, "exit.json")) or None,
        "step": step,
        "last": last,
        "changed": files.newest,
        "bytes": files.bytes,
        "events_bytes": whole_bytes,
        "checkpoints": found,
        "model_bytes": Sizes(model).bytes if real else 0,
        "others": others,
    }


class Sizes:
    """Bytes of all files below a directory, and when the newest of them was written (Unix seconds)."""

    def __init__(self, path: str) -> None:
        self.bytes, self.newest = 0, 0.0
        pulse = Pulse(f"looking at {path}")
        for directory, _, names in os.walk(path):
            pulse.beat()
            for name in ("", *names):
                with contextlib.suppress(OSError):
                    found = os.lstat(os.path.join(directory, name) if name else directory)
                    self.bytes += found.st_size if name else 0
                    self.newest = max(self.newest, found.st_mtime)

    @staticmethod
    def of(path: str) -> int:
        """Of one file, 0 where there is none."""
        try:
            return os.lstat(path).st_size
        except OSError:
            return 0


def state_of(path: str) -> str:
    """running, starting, new (never started), ended, lost (no end on record, no process), or unknown."""
    try:
        with held(path) as free:
            ended = os.path.lexists(os.path.join(path, "exit.json"))
            last, begun = "", False
            for line in _read(path, "supervisor.jsonl", 16 << 20).splitlines():
                event = _json(line).get("event")
                if event in ("starting", "started", "again"):
                    last, begun = event, True
    except OSError:
        return "unknown"
    if not free:
        return "running" if last == "started" else "starting"
    return "ended" if ended else "lost" if begun else "new"


@contextlib.contextmanager
def held(path: str) -> Iterator[bool]:
    """Takes a run's lock while inside; False where its supervisor, its trainer or whoever starts it has it."""
    try:
        descriptor = open_below(path, ".lock", os.O_RDWR)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _progress(path: str) -> tuple[int, int | None, float | None]:
    """Bytes of whole lines in the stream; the last step and the time of the last event, as far as its end tells."""
    size = Sizes.of(os.path.join(path, "events.jsonl"))
    *lines, torn = _read(path, "events.jsonl", TAIL, tail=True).split(b"\n")
    step: int | None = None
    last: float | None = None
    for line in reversed(lines):
        event = _json(line)
        if last is None and isinstance(event.get("t"), int | float):
            last = event["t"]
        told = event.get("step")
        if not isinstance(told, int):
            continue
        if event.get("event") == "step":
            step = told
            break
        # A checkpoint is told of when later steps are made, and an attempt's heartbeats begin at 0.
        step = max(step or 0, told)
    return max(0, size - len(torn)), step, last


def op_run(request: Answer, _: Input) -> Answer:
    """One run by its directory `run_dir`, as a row of `op_runs`; `present` is false where there is none."""
    path = whole(request["run_dir"])
    present = os.path.isdir(path) and not os.path.islink(path)
    return {"present": present, **(_run(path, os.path.basename(path)) if present else {})}


def _checkpoints(path: str) -> tuple[list[Answer], list[str]]:
    """Those that are committed, newest first, and the names of what only looks like one: a symbolic link, say."""
    root, found, others = os.path.join(path, "checkpoints"), [], []
    try:
        if os.path.islink(root):
            return [], ["checkpoints"]
        with os.scandir(root) as entries:
            named = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if CHECKPOINT.fullmatch(e.name))
    except OSError:
        return [], []
    for name, real in reversed(named):
        if real:
            found.append(_checkpoint(root, name))
        else:
            others.append(f"checkpoints/{name}")
    return found, others


def _checkpoint(root: str, name: str) -> Answer:
    """A checkpoint by its own manifest, which is not verified here."""
    raw = _read(root, f"{name}/manifest.json", MANIFEST_CAP)
    manifest = _json(raw)
    state, kinds = manifest.get("state"), manifest.get("kinds")
    best = state.get("best") if isinstance(state, dict) else None
    loss = best.get("loss") if isinstance(best, dict) else None
    return {
        "name": name,
        "kinds": [each[:40] for each in kinds if isinstance(each, str)][:8] if isinstance(kinds, list) else [],
        "best_loss": loss if isinstance(loss, int | float) else None,
        "bytes": Sizes(os.path.join(root, name)).bytes,
        "sha256": hashlib.sha256(raw).hexdigest() if manifest else None,
    }


def _rest(base: str, kind: str, uses: set[str]) -> list[Answer]:
    """What is no run and takes room: hashes that no run mentions, damaged, unfinished and half removed ones."""
    found = []
    for name in _directories(os.path.join(base, kind)):
        path = os.path.join(base, kind, name)
        what = _what(kind, name)
        if what is None:
            continue
        sizes = Sizes(path)
        seen = sizes.newest if what in ("part", "removed") else _last_seen(path)
        busy = what == "part" and _being_written(path)
        used = what == "unused" and name in uses
        found.append(
            {"name": f"{kind}/{name}", "what": what, "bytes": sizes.bytes, "seen": seen, "busy": busy, "used": used}
        )
    return found


def _what(kind: str, name: str) -> str | None:
    if REMOVED.fullmatch(name):
        return "removed"
    if name.endswith(PART) and (HASH if kind != "runs" else RUN_NAME).fullmatch(name.removesuffix(PART)):
        return "part"
    if kind == "runs":
        return None
    return "unused" if HASH.fullmatch(name) else "damaged" if DAMAGED.fullmatch(name) else None


def _last_seen(path: str) -> float:
    """When it was put there, or last compared: the record beside it is written then."""
    try:
        return os.lstat(path + ".json").st_mtime
    except OSError:
        return os.lstat(path).st_mtime


def _being_written(path: str) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def op_remove(request: Answer, _: Input) -> Answer:
    """Removes one thing of `base` by its `name`: runs/RUN (with its uuid as `run`), or an entry of `rest` -> `bytes`.

    Everything that `op_runs` said of it is looked at again. It is renamed first, so that no half of it keeps its name.
    """
    base, name = whole(request["base"]), str(request["name"])
    kind, _slash, last = name.partition("/")
    if kind not in ("runs", "store", "engine"):
        raise Refused(f"{name!r}: nothing that can be removed")
    parent = os.path.join(base, kind)
    path = os.path.join(parent, last)
    what = _what(kind, last)
    if what is None:
        if kind != "runs" or not RUN_NAME.fullmatch(last):
            raise Refused(f"{name!r}: nothing that can be removed")
        _is_directory(path)
        aside = _run_aside(path, request.get("run"))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + ".json")
        return {"bytes": _delete(aside)}
    _is_directory(path)
    if what == "removed":
        return {"bytes": _delete(path)}
    if what == "part" and _being_written(path):
        raise Refused(f"{name}: is being sent just now")
    aside = _aside(path)
    if what == "unused" and last in _mentioned(base):
        os.rename(aside, path)
        raise Refused(f"{name}: a run uses it")
    with contextlib.suppress(FileNotFoundError):
        if what == "unused":
            os.unlink(path + ".json")
    return {"bytes": _delete(aside)}


def _is_directory(path: str) -> None:
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise Refused(f"{path}: no directory")


def _run_aside(path: str, run: object) -> str:
    """Renames a run's directory while its lock is ours: nobody can start it in between."""
    if _json(_read(path, "dispatch.json")).get("run") != run:
        raise Refused(f"{path}: is another run than the one that was listed")
    # Made where it is missing, so that a start at this very moment meets it.
    os.close(open_below(path, ".lock", os.O_RDWR | os.O_CREAT))
    with held(path) as free:
        if not free:
            raise Refused(f"{path}: is running: its lock is held")
        return _aside(path)


def _aside(path: str) -> str:
    aside = os.path.join(os.path.dirname(path), f".removed-{secrets.token_hex(4)}")
    os.rename(path, aside)
    sync_directory(os.path.dirname(path))
    return aside


def _mentioned(base: str) -> set[str]:
    """Every hash that a run's configuration or manifest mentions: what it may need. Links to runs elsewhere count."""
    runs, found = os.path.join(base, "runs"), set[str]()
    for name in os.listdir(runs) if os.path.isdir(runs) else ():
        with contextlib.suppress(OSError):
            for file in ("dispatch.json", "config.yaml"):
                found.update(HASH.findall(_read(os.path.join(runs, name), file).decode(errors="replace")))
    return found


def _delete(path: str) -> int:
    """Deletes a directory that lost its name; another console at the same work does not matter. Returns its bytes."""
    size, pulse = Sizes(path).bytes, Pulse("deleting")
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(shutil.rmtree, path, True)
        while not work.done():
            wait([work], BUSY_SECONDS)
            pulse.beat()
    if os.path.lexists(path):
        shutil.rmtree(path)  # says why
    sync_directory(os.path.dirname(path))
    return size


OPERATIONS = {"runs": op_runs, "run": op_run, "remove": op_remove}
