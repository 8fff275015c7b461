"""What is done on a host for a console: one standard-library file that travels in argv and leaves nothing behind.

    python -P -c SOURCE      one JSON request, a line on standard input; JSON answers, a line each, on standard output

The last answer has `done` or `error`; answers before it (`busy`, `say`, `at`) tell how far it is. `send` and `receive`
carry file contents between the lines, as their docstrings say. Needs Python 3.11 or later.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import pwd
import re
import secrets
import select
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

MAX_REQUEST = 32 << 20
MAX_FILES = 100_000
MAX_DEPTH = 32
CHUNK = 1 << 20
SMALL = 512 << 10
"""So few bytes are hashed sooner than another thread is told to."""
ROOM = 256 << 10
"""Bytes read at a time of what is received, always to the same place: new memory for each costs about as much as
hashing does."""
PIECE = 32 << 10
"""Bytes a write. Larger ones cost some kernels several times the time: they look for larger pages to put them in."""
ACK_BYTES = 4 << 20
SYNC_BYTES = 32 << 20
IDLE_SECONDS = 30.0
"""A sender that is silent for so long is gone, whatever the connection says; what came from it stays."""
DECIDE_SECONDS = 300.0
"""So long the sender may read through its own file before it goes on with one that is here in part."""
LOCK_SECONDS = 3600.0
BUSY_SECONDS = 2.0
TOOL_SECONDS = 10.0
PART = ".part"

Answer = dict[str, Any]


class Refused(Exception):
    """The request cannot be carried out; the text is one line for the operator."""


# Lines


def say(**fields: Any) -> None:
    """One answer, at once."""
    write_all(1, (json.dumps(fields) + "\n").encode())


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class Pulse:
    """Says that work goes on, not more often than every BUSY_SECONDS."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = time.monotonic() + BUSY_SECONDS

    def beat(self, done: int = 0) -> None:
        """Called while the work goes on; `done` in bytes."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + BUSY_SECONDS
            say(busy=self._what, bytes=done)


class Input:
    """Standard input as lines and as exact numbers of bytes."""

    def __init__(self) -> None:
        self._buffer = b""
        self._room = memoryview(bytearray(ROOM))

    def line(self, seconds: float = IDLE_SECONDS) -> Answer:
        """A JSON object; the end of the input ends it too."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_REQUEST:
                raise Refused("the request is too large")
            if not select.select([0], [], [], seconds)[0]:
                raise Refused("nothing has come from the console for too long")
            data = os.read(0, CHUNK)
            if not data:
                break
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\n")
        value = json.loads(raw)
        if not isinstance(value, dict):
            raise Refused("the request is no JSON object")
        return value

    def take(self, limit: int) -> bytes | memoryview:
        """Some bytes of the content, at most so many; they are there until the next call."""
        if self._buffer:
            data, self._buffer = self._buffer[:limit], self._buffer[limit:]
            return data
        if not select.select([0], [], [], IDLE_SECONDS)[0]:
            raise Refused("nothing has come from the console for too long")
        count = os.readv(0, [self._room[:limit]])
        if not count:
            raise Refused("the console is gone")
        return self._room[:count]

    def exactly(self, count: int) -> bytes:
        """So many bytes."""
        data = b""
        while len(data) < count:
            data += self.take(count - len(data))
        return data


# Files


def whole(path: object) -> str:
    """A path of this host: absolute, or below the home directory."""
    if not isinstance(path, str) or not path.startswith(("/", "~/")) or "\0" in path:
        raise Refused(f"{path!r}: no absolute path")
    return os.path.normpath(os.path.expanduser(path))


def parts_of(name: object) -> list[str]:
    """A name below a directory, as its components."""
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise Refused(f"{name!r}: no name below a directory")
    return parts


@contextlib.contextmanager
def parent_of(root: str, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
    """The directory that holds a name, and the name's last component; no symbolic link is followed below `root`."""
    *directories, last = parts_of(name)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    here = os.open(root, flags)
    try:
        for each in directories:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(each, 0o700, dir_fd=here)
            below = os.open(each, flags | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
        yield here, last
    finally:
        os.close(here)


def open_below(root: str, name: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file below a directory; it and the directories are no symbolic links."""
    with parent_of(root, name, make=bool(flags & os.O_CREAT)) as (directory, last):
        descriptor = os.open(
            last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600, dir_fd=directory
        )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return descriptor


def digest_of(descriptor: int, limit: int, pulse: Pulse) -> Any:
    """A SHA-256 over the first bytes of a file, to be gone on with; the file stands behind them then."""
    digest, done = hashlib.sha256(), 0
    os.lseek(descriptor, 0, os.SEEK_SET)
    while done < limit:
        data = os.read(descriptor, min(CHUNK, limit - done))
        if not data:
            raise Refused("became shorter while it was read")
        digest.update(data)
        done += len(data)
        pulse.beat(done)
    return digest


def sync_directory(path: str | int) -> None:
    """Waits until a directory's entries are on the disk."""
    descriptor = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        if not isinstance(path, int):
            os.close(descriptor)


def make_directories(path: str) -> None:
    """Makes a directory and those above it, for the user alone."""
    if not os.path.isdir(path):
        make_directories(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)


def lock(open_it: Callable[[], int], look: Callable[[], os.stat_result], what: str) -> int:
    """A locked descriptor of what really stands at a path: another one may have moved it while we waited.

    The kernel gives the lock back with the process, however it ends.
    """
    deadline, pulse = time.monotonic() + LOCK_SECONDS, Pulse(f"waiting: another console is sending {what}")
    while True:
        descriptor = open_it()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise Refused(f"{what}: another console has been sending it for too long") from None
            pulse.beat()
            time.sleep(0.1)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), look()):
                return descriptor
        os.close(descriptor)


class Writer:
    """Writes a file in order; meanwhile the SHA-256 is computed, and the disk works, in threads of their own."""

    def __init__(self, descriptor: int, digest: Any) -> None:
        self._digest = digest
        self._descriptor = descriptor
        self._unsynced = 0
        self._syncing: threading.Thread | None = None
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._hashed()
        if len(data) < SMALL or not isinstance(data, bytes):  # what can change is hashed before this returns
            self._digest.update(data)
        else:
            self._hashing = self._hasher.submit(self._digest.update, data)
        rest = memoryview(data)
        for start in range(0, len(data), PIECE):
            write_all(self._descriptor, rest[start : start + PIECE])
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or not self._syncing.is_alive()):
            self._unsynced = 0
            self._syncing = threading.Thread(target=self._sync, daemon=True)
            self._syncing.start()

    def _hashed(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def hexdigest(self) -> str:
        """SHA-256 of all that was written."""
        self._hashed()
        found: str = self._digest.hexdigest()
        return found

    def _sync(self) -> None:
        with contextlib.suppress(OSError):  # told again, and heard, at the end
            os.fsync(self._descriptor)

    def finish(self, pulse: Pulse | None = None) -> None:
        """Returns when all of it is on the disk."""
        failed: list[OSError] = []

        def sync() -> None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                failed.append(error)

        if self._syncing is not None:
            self._syncing.join()
        self._syncing = threading.Thread(target=sync, daemon=True)
        self._syncing.start()
        while self._syncing.is_alive():
            self._syncing.join(BUSY_SECONDS)
            if pulse is not None:
                pulse.beat()
        if failed:
            raise failed[0]

    def join(self) -> None:
        """Waits for the threads, so that the descriptor can be closed."""
        self._hasher.shutdown()
        if self._syncing is not None:
            self._syncing.join()


# Operations


def op_hash(request: Answer, _: Input) -> Answer:
    """`paths` -> `files`: each with `path`, and `size` and `sha256` or `error`.

    With `first` the hash is that of so many bytes from the beginning on, or of all where there are fewer.
    """
    found = []
    first = request.get("first")
    for path in request["paths"][:MAX_FILES]:
        root, name = os.path.split(whole(path))
        try:
            descriptor = open_below(root, name)
            try:
                size = os.fstat(descriptor).st_size
                limit = size if first is None else min(size, int(first))
                digest = digest_of(descriptor, limit, Pulse(f"reading {path}"))
            finally:
                os.close(descriptor)
            found.append({"path": path, "size": size, "sha256": digest.hexdigest()})
        except (OSError, Refused) as error:
            found.append({"path": path, "error": _reason(error)})
    return {"files": found}


def op_tree(request: Answer, _: Input) -> Answer:
    """`root` -> `files`: [name, size, modification time in ns]; `others`: [name, kind] of what is no regular file.

    Symbolic links are not followed. Names that are no UTF-8 have lone surrogates.
    """
    root = whole(request["root"])
    pulse = Pulse(f"listing {root}")
    files: list[tuple[str, int, int]] = []
    others: list[tuple[str, str]] = []

    def walk(path: str, prefix: str, depth: int) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                if len(files) + len(others) >= MAX_FILES:
                    raise Refused(f"{root}: more than {MAX_FILES:,} files")
                pulse.beat()
                name = prefix + entry.name
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(found.st_mode):
                    files.append((name, found.st_size, found.st_mtime_ns))
                elif not stat.S_ISDIR(found.st_mode):
                    others.append((name, _kind(found.st_mode)))
                elif depth < MAX_DEPTH:
                    walk(entry.path, name + "/", depth + 1)
                else:
                    others.append((name, "directory, too deep"))

    walk(root, "", 1)
    return {"root": root, "files": sorted(files), "others": sorted(others)}


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def op_send(request: Answer, _: Input) -> Answer:
    """Sends files below `root`; `files`: [name, offset, SHA-256 of the receiver's first `offset` bytes, size].

    Of each: a line with `name`, `size`, `there` (the file's own size) and `from` (the offset, or 0 where those first
    bytes are others here), then exactly `size - from` bytes, then a line with `changed` (it was written to meanwhile)
    and, where `digest` is asked for, `sha256`. A `size` that is not null is how much of the file is wanted; the file
    may have more.
    """
    root, with_digest = whole(request["root"]), bool(request.get("digest"))
    for name, offset, prefix, wanted in request["files"]:
        try:
            descriptor = open_below(root, name)
        except OSError as error:
            raise Refused(f"{name}: {_reason(error)}") from None
        try:
            before = os.fstat(descriptor)
            size = before.st_size if wanted is None else wanted
            if before.st_size < size:
                raise Refused(f"{name}: {before.st_size:,} bytes are there, expected {size:,}")
            start, digest = 0, hashlib.sha256()
            if 0 < offset <= size:
                digest = digest_of(descriptor, offset, Pulse(f"comparing {name}"))
                start = offset if digest.hexdigest() == prefix else 0
            if start == 0:
                digest = hashlib.sha256()
            os.lseek(descriptor, start, os.SEEK_SET)
            say(**{"name": name, "size": size, "from": start, "there": before.st_size})
            if with_digest:
                _copy(descriptor, size - start, digest, name)
            else:
                _splice(descriptor, start, size - start, name)
            after = os.fstat(descriptor)
            same = (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
            say(sha256=digest.hexdigest() if with_digest else None, changed=not same)
        finally:
            os.close(descriptor)
    return {}


def _copy(descriptor: int, count: int, digest: Any, name: str) -> None:
    while count:
        data = os.read(descriptor, min(CHUNK, count))
        if not data:
            raise Refused(f"{name}: became shorter while it was read")
        write_all(1, data)
        digest.update(data)
        count -= len(data)


def _splice(descriptor: int, offset: int, count: int, name: str) -> None:
    """Copies inside the kernel where it can do that."""
    while count:
        try:
            sent = os.sendfile(1, descriptor, offset, min(CHUNK, count))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP):
                raise
            os.lseek(descriptor, offset, os.SEEK_SET)
            return _copy(descriptor, count, hashlib.sha256(), name)
        if sent == 0:
            raise Refused(f"{name}: became shorter while it was read")
        offset += sent
        count -= sent
    return None


def op_receive(request: Answer, source: Input) -> Answer:
    """Takes files below `root`; `files`: [name, size, SHA-256 or null]. One file alone, or a tree with `place`.

    Answers `have`: of each file how many bytes are here and what their SHA-256 is (all of them: it is finished). The
    console answers `from`: where it goes on, 0 for anew. Then come, of each file that is not finished, the bytes from
    there and the 32 bytes of the whole content's SHA-256. A file is written as NAME.part and gets its name when it is
    whole, has that hash and is on the disk. With `place` the whole directory is moved there in the end, see `op_place`;
    when it is there already, `done` comes at once with `present`.
    """
    root, files, place = whole(request["root"]), request["files"], request.get("place")
    if place is not None:
        return _receive_tree(root, files, whole(place), source)
    (name, size, expected), *_ = files
    parts_of(name)
    make_directories(root)

    def open_part() -> int:
        return open_below(root, name + PART, os.O_RDWR | os.O_CREAT)

    def look() -> os.stat_result:
        with parent_of(root, name) as (directory, last):
            return os.stat(last + PART, dir_fd=directory, follow_symlinks=False)

    part = lock(open_part, look, os.path.join(root, name))
    try:
        if expected is not None and (found := _finished(root, name, size)) == expected:
            with parent_of(root, name) as (directory, last):
                os.unlink(last + PART, dir_fd=directory)
            return {"present": True, "sha256": expected, "size": size}
        here = os.fstat(part).st_size
        found = digest_of(part, here, Pulse(f"reading {name}{PART}")) if 0 < here <= size else None
        say(have=[[here if found else 0, found.hexdigest() if found else None]])
        start = source.line(DECIDE_SECONDS)["from"][0]
        _check_space(root, size - start)
        digest = _receive_file(part, root, name, size, start, found if start else None, source, 0)
        _commit(root, name, part, digest, expected, source)
        with parent_of(root, name) as (directory, _last):
            sync_directory(directory)
        return {"present": False, "sha256": digest, "size": size}
    except BaseException:
        if os.fstat(part).st_size == 0:
            with contextlib.suppress(OSError), parent_of(root, name) as (directory, last):
                os.unlink(last + PART, dir_fd=directory)
        raise
    finally:
        os.close(part)


def _check_space(root: str, wanted: int) -> None:
    free = shutil.disk_usage(root).free
    if wanted > free:
        raise OSError(errno.ENOSPC, f"the disk is full: {wanted:,} bytes are to come, {free:,} are free", root)


def _finished(root: str, name: str, size: int) -> str | None:
    """The SHA-256 of a file of this size, None when there is none."""
    try:
        descriptor = open_below(root, name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise Refused(f"{name}: is there, and no regular file") from None
        raise
    try:
        if os.fstat(descriptor).st_size != size:
            return None
        found: str = digest_of(descriptor, size, Pulse(f"reading {name}")).hexdigest()
        return found
    finally:
        os.close(descriptor)


def _receive_file(
    part: int, root: str, name: str, size: int, start: int, digest: Any, source: Input, before: int
) -> str:
    if start and (digest is None or start > size):
        raise Refused(f"{name}: there is nothing to go on from")
    os.ftruncate(part, start)
    os.lseek(part, start, os.SEEK_SET)
    writer = Writer(part, digest or hashlib.sha256())
    left, acknowledged = size - start, 0
    try:
        while left:
            data = source.take(min(CHUNK, left))
            writer.write(data)
            left -= len(data)
            if size - left - acknowledged >= ACK_BYTES:
                acknowledged = size - left
                say(at=before + acknowledged)
        writer.finish(Pulse(f"waiting for the disk: {name}"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.path.join(root, name + PART)) from None
    finally:
        writer.join()
    return writer.hexdigest()


def _commit(root: str, name: str, part: int, digest: str, expected: str | None, source: Input) -> None:
    told = source.exactly(32).hex()
    with parent_of(root, name) as (directory, last):
        if digest != told or (expected is not None and digest != expected):
            os.unlink(last + PART, dir_fd=directory)
            raise Refused(f"{name}: arrived with SHA-256 {digest}, expected {expected or told}; it was thrown away")
        if not os.path.samestat(os.fstat(part), os.stat(last + PART, dir_fd=directory, follow_symlinks=False)):
            raise Refused(f"{name}{PART}: was replaced meanwhile")
        os.rename(last + PART, last, src_dir_fd=directory, dst_dir_fd=directory)


def _receive_tree(root: str, files: list[Any], place: str, source: Input) -> Answer:
    if not 0 < len(files) <= MAX_FILES:
        raise Refused("no files, or too many")
    for name, _, _ in files:
        parts_of(name)
    if os.path.dirname(root) != os.path.dirname(place) or root == place:
        raise Refused(f"{root}: cannot become {place}")
    if present(place, files):
        return {"present": True, "root": place}
    parent = os.path.dirname(root)
    make_directories(parent)

    def open_root() -> int:
        with contextlib.suppress(FileExistsError):
            os.mkdir(root, 0o700)
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    held = lock(open_root, lambda: os.lstat(root), place)
    try:
        if present(place, files):  # the one that we waited for has brought it
            with contextlib.suppress(OSError):
                os.rmdir(root)
            return {"present": True, "root": place}
        have, digests = _tree_so_far(root, files)
        say(have=have)
        starts = source.line(DECIDE_SECONDS)["from"]
        _check_space(root, sum(size - start for (_, size, _), start in zip(files, starts, strict=True)))
        done = 0
        for (name, size, expected), (_, finished), digest, start in zip(files, have, digests, starts, strict=True):
            if not (finished == expected and start == size):
                part = open_below(root, name + PART, os.O_RDWR | os.O_CREAT)
                try:
                    found = _receive_file(part, root, name, size, start, digest if start else None, source, done)
                    _commit(root, name, part, found, expected, source)
                finally:
                    os.close(part)
            done += size
            say(at=done)
        return _place(root, place, files)
    finally:
        os.close(held)


def _tree_so_far(root: str, files: list[Any]) -> tuple[list[list[Any]], list[Any]]:
    have: list[list[Any]] = []
    digests: list[Any] = []
    for name, size, expected in files:
        digest, here = None, 0
        if (found := _finished(root, name, size)) is not None and found == expected:
            have.append([size, found])
            digests.append(None)
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = open_below(root, name + PART)
            try:
                here = os.fstat(descriptor).st_size
                if 0 < here <= size:
                    digest = digest_of(descriptor, here, Pulse(f"reading {name}{PART}"))
                if digest and digest.hexdigest() == expected:
                    os.fsync(descriptor)
                    with parent_of(root, name) as (directory, last):
                        os.rename(last + PART, last, src_dir_fd=directory, dst_dir_fd=directory)
            finally:
                os.close(descriptor)
        have.append([here, digest.hexdigest()] if digest else [0, None])
        digests.append(digest)
    return have, digests


def present(place: str, files: list[Any]) -> bool:
    """Whether a tree stands at its place as it was put there; a damaged one is set aside.

    What was seen of each file when it was hashed stands beside the tree: one that nobody has touched since is not read
    again. Files that are there in addition do not matter.
    """
    if not os.path.isdir(place) or os.path.islink(place):
        return False
    known: Answer = {}
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(Path(place + ".json").read_bytes())
        known = value if isinstance(value, dict) else {}
    seen: Answer = {}
    pulse = Pulse(f"reading {place}")
    for name, size, expected in files:
        try:
            descriptor = open_below(place, name)
        except OSError:
            return _set_aside(place)
        try:
            look = _look(os.fstat(descriptor))
            if look[0] != size:
                return _set_aside(place)
            if known.get(name) != [*look, expected] and digest_of(descriptor, size, pulse).hexdigest() != expected:
                return _set_aside(place)
            seen[name] = [*look, expected]
        finally:
            os.close(descriptor)
    if seen != known:
        _write_json(place + ".json", seen)
    else:
        os.utime(place + ".json")  # used just now: not to be cleaned away before the run that wants it stands here
    return True


def _look(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _set_aside(place: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.rename(place, f"{place}.damaged-{secrets.token_hex(4)}")
    say(busy=f"{place}: is damaged and was set aside", bytes=0)
    return False


def _write_json(path: str, value: object) -> None:
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, json.dumps(value).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def op_place(request: Answer, _: Input) -> Answer:
    """Moves a finished tree `root` to `place` beside it, once every one of its `files` was read and found right.

    Two at once: the first one moves, both succeed.
    """
    root, place, files = whole(request["root"]), whole(request["place"]), request["files"]
    if present(place, files):
        return {"present": True, "root": place}
    for name, size, expected in files:
        if _finished(root, name, size) != expected:
            raise Refused(f"{root}/{name}: is not what it should be")
    return _place(root, place, files)


def _place(root: str, place: str, files: list[Any]) -> Answer:
    """The files were hashed when they came; what is here besides them does not come along."""
    wanted = {name for name, _, _ in files}
    for path, _, names in os.walk(root, topdown=False):
        for name in names:
            inside = os.path.relpath(os.path.join(path, name), root)
            if inside not in wanted:
                os.unlink(os.path.join(path, name))
        sync_directory(path)
    seen: Answer = {}
    for name, _, expected in files:
        descriptor = open_below(root, name)
        try:
            os.fchmod(descriptor, 0o400)
            seen[name] = [*_look(os.fstat(descriptor)), expected]
        finally:
            os.close(descriptor)
    try:
        os.rename(root, place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not present(place, files):
            raise
        shutil.rmtree(root)
        return {"present": True, "root": place}
    _write_json(place + ".json", seen)
    sync_directory(os.path.dirname(place))
    return {"present": False, "root": place}


# Facts


GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
LOCK_DIRECTORIES = ("/run/lock", "/tmp")
"""Where the supervisor keeps the lock of a GPU, the first that everybody on the host may write to."""
CONFIG_BYTES = 1 << 20
NAMED_FILES = 20_000


def op_facts(request: Answer, source: Input) -> Answer:
    """What a host is, for a pre-flight: Python, torch, devices, memory, disk at `base`, write access, clock.

    `visible` stands for CUDA_VISIBLE_DEVICES where it is given; `named` are paths to look at. With `clocks` each line
    `{"clock": true}` is answered by the time here, until another line comes. With `probe` false no file is made to see
    whether one can be written.
    """
    base, asked = whole(request["base"]), request.get("visible", os.environ.get("CUDA_VISIBLE_DEVICES"))
    with ThreadPoolExecutor(4) as pool:  # each nvidia-smi takes a second where nothing keeps the driver awake
        smi, computing, cuda = pool.submit(_devices), pool.submit(_processes), pool.submit(_driver_cuda)
        named = pool.submit(lambda: [_named(each) for each in request.get("named", [])[:100]])
        while request.get("clocks") and source.line().get("clock"):
            say(time=time.time())
        torch, packages = torch_facts(), {name: _version(name) for name in request.get("packages", [])[:100]}
        devices, problem = smi.result()
    device, hidden, wrong = _chosen(devices, asked)
    return {
        "hostname": socket.gethostname(),
        "arch": platform.machine(),
        "system": platform.platform(),
        "uid": os.getuid(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "time": time.time(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "prefix": sys.prefix,
        "torch": torch,
        "packages": packages,
        "devices": devices,
        "nvidia_smi": problem or wrong,
        "driver_cuda": cuda.result() if devices else None,
        "gpu": device,
        "gpu_hidden": hidden,
        "gpu_nodes": any(map(os.path.exists, GPU_NODES)),
        "lock": _gpu_lock(device) if device else None,
        "processes": computing.result() if devices else [],
        "unified_memory": bool(devices) and all(each["memory_total"] is None for each in devices),
        "memory": _meminfo(),
        "base": _base(base, probe=request.get("probe") is not False),
        "named": named.result(),
    }


def _chosen(devices: list[Answer], asked: str | None) -> tuple[str | None, bool, str | None]:
    """The device that a run would take, as the supervisor chooses it; whether all are hidden; what is wrong."""
    wanted = "0" if asked is None else asked.split(",")[0].strip()
    if wanted in ("", "-1", "NoDevFiles"):
        return None, True, None
    for each in devices:
        if str(each["index"]) == wanted or each["uuid"].startswith(wanted):
            return each["uuid"], False, None
    if not devices or wanted.startswith("MIG-"):
        return (wanted if devices else None), False, None
    known = ", ".join(str(each["index"]) for each in devices)
    return None, False, f"CUDA_VISIBLE_DEVICES={wanted[:80]}: nvidia-smi knows {known[:200]}"


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver takes; only the head of the table has it in every version of nvidia-smi."""
    found = re.search(r"CUDA[ \w]*Version\s*:\s*(\d+\.\d+)", _run_smi()[0])
    return found[1] if found else None


def _gpu_lock(device: str) -> Answer:
    """Whether a run holds a device. The lock is not tried: a run that starts in that moment would be refused."""
    name = "kdconsole-" + "".join(c if c.isalnum() or c == "-" else "_" for c in device)[:80] + ".lock"
    path = os.path.join(next((d for d in LOCK_DIRECTORIES if os.access(d, os.W_OK)), LOCK_DIRECTORIES[-1]), name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return {"path": path, "held": False, "by": None}
    except OSError:
        return {"path": path, "held": None, "by": None}
    try:
        found = os.fstat(descriptor)
        held = _flocked(path, found)
        by = os.pread(descriptor, 4096, 0) if stat.S_ISREG(found.st_mode) else b""
    finally:
        os.close(descriptor)
    return {"path": path, "held": held, "by": by.decode(errors="replace").strip() or None}


def _flocked(path: str, found: os.stat_result) -> bool | None:
    """Whether somebody has locked a file, by the system's own list; None where it has none."""
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    if any("FLOCK" in fields and place in fields for fields in map(str.split, lines)):
        return True
    # In a container the list lacks locks whose first owner is gone; a process that has it open tells, if it is ours.
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{number}") == path:
                    text = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii", errors="replace")
                    if re.search(r"^lock:.*\bFLOCK\b", text, re.MULTILINE):
                        return True
    return False


def _named(path: object) -> Answer:
    """What is at a path; of a directory its size, and its config.json where it is a model."""
    there = whole(path)
    told: Answer = {"path": there, "kind": None, "bytes": 0, "files": 0, "more": False, "config": None}
    told |= {"weights": False, "problem": None}
    try:
        found = os.stat(there)
        told["kind"] = "other"
        if stat.S_ISREG(found.st_mode):
            told |= {"kind": "file", "bytes": found.st_size, "files": 1}
            os.close(os.open(there, os.O_RDONLY | os.O_NONBLOCK))
        elif stat.S_ISDIR(found.st_mode):
            names, told["kind"] = os.listdir(there), "directory"
            told["weights"] = "model.safetensors" in names or "model.safetensors.index.json" in names
            config = Path(there, "config.json")
            if "config.json" in names and config.is_file() and config.stat().st_size <= CONFIG_BYTES:
                told["config"] = config.read_text(encoding="utf-8", errors="replace")
            for directory, below, files in os.walk(there):
                below[:] = [each for each in below if not each.startswith(".")]
                for name in files:
                    if not name.startswith("."):
                        told["files"] += 1
                        with contextlib.suppress(OSError):
                            told["bytes"] += os.stat(os.path.join(directory, name)).st_size
                if told["files"] > NAMED_FILES:
                    told["more"] = True
                    break
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        told["problem"] = _reason(error)
    return told


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_facts() -> Answer | None:
    """torch's version and the CUDA it was built for, without the seconds that importing it takes."""
    version = _version("torch")
    if version is None:
        return None
    cuda = None
    with contextlib.suppress(OSError, ValueError, ImportError, AttributeError):
        spec = importlib.util.find_spec("torch")
        text = Path(str(spec.origin if spec else "")).with_name("version.py").read_text(encoding="utf-8")
        if told := re.search(r"""^__version__\s*=\s*['"]([^'"]+)""", text, re.MULTILINE):
            version = told[1]
        if found := re.search(r"""^cuda\b[^=\n]*=\s*['"]([^'"]+)""", text, re.MULTILINE):
            cuda = found[1]
    return {"version": version, "cuda": cuda}


def _smi(*options: str) -> tuple[list[list[str]], str | None]:
    """Rows of nvidia-smi, and what is wrong when there are none."""
    text, problem = _run_smi(*options, "--format=csv,noheader,nounits")
    return [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row][:1000], problem


def _run_smi(*options: str) -> tuple[str, str | None]:
    """What nvidia-smi prints, and what is wrong when it does not."""
    program = shutil.which("nvidia-smi", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin:/usr/lib/wsl/lib")
    if program is None:
        return "", "not found"
    try:
        done = subprocess.run(
            [program, *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer after {TOOL_SECONDS:g} s"
    except OSError as error:
        return "", _reason(error)
    if done.returncode:
        told = (done.stdout.strip() or done.stderr.strip()).splitlines()
        return "", (told[0] if told else f"exit code {done.returncode}")[:300]
    return done.stdout, None


def _devices() -> tuple[list[Answer], str | None]:
    fields = "index,uuid,name,driver_version,memory.total,memory.used,compute_cap,memory.free"
    rows, problem = _smi(f"--query-gpu={fields}")
    found = []
    for row in rows:
        if len(row) == 8 and row[0].isdigit():
            found.append(
                {
                    "index": int(row[0]),
                    "uuid": row[1],
                    "name": row[2],
                    "driver": row[3],
                    "memory_total": _mib(row[4]),
                    "memory_used": _mib(row[5]),
                    "capability": row[6],
                    "memory_free": _mib(row[7]),
                }
            )
    return found, problem


def _processes() -> list[Answer]:
    """Who computes on the devices; `memory` in bytes."""
    found = []
    for row in _smi("--query-compute-apps=pid,gpu_uuid,used_memory,process_name")[0]:
        if len(row) >= 4 and row[0].isdigit():
            found.append({"pid": int(row[0]), "uuid": row[1], "memory": _mib(row[2]), **_who(int(row[0]), row[3])})
    return found


def _who(pid: int, name: str) -> Answer:
    """Owner and first words of a process; what may be a secret of somebody else is left out."""
    owner, user, words = None, None, [name]
    with contextlib.suppress(OSError, KeyError):
        owner = os.stat(f"/proc/{pid}").st_uid
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()[:500]
        words = [word.decode(errors="replace") for word in raw.split(b"\0") if word][:3] or words
        user = pwd.getpwuid(owner).pw_name
    if "-c" in words:
        words = words[: words.index("-c") + 1]
    return {"uid": owner, "user": user, "command": " ".join(word.partition("=")[0] for word in words)}


def _mib(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None


def _meminfo() -> Answer | None:
    """Bytes of memory and of swap."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    names = {"total": "MemTotal", "available": "MemAvailable", "swap_total": "SwapTotal", "swap_free": "SwapFree"}
    return {key: kib[name] << 10 for key, name in names.items() if name in kib}


def _base(base: str, probe: bool) -> Answer:
    """The directory that runs go to, or would: its nearest part that exists; `probe` makes and removes a file there."""
    there = base
    while not os.path.lexists(there) and there != "/":
        there = os.path.dirname(there)
    problem = None
    if not os.path.isdir(there):
        problem = f"{there} is no directory"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} cannot be written"
    elif probe:
        name = os.path.join(there, f".kdconsole-{secrets.token_hex(4)}")
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            os.unlink(name)
        except OSError as error:
            problem = f"{there}: {_reason(error)}"
    try:
        usage = shutil.disk_usage(there)
        disk = {"total": usage.total, "free": usage.free}
    except OSError:
        disk = None
    return {"path": base, "exists": os.path.isdir(base), "writable": problem is None, "problem": problem, "disk": disk}


# A virtual environment

VENV_PROBE = """
import importlib.metadata as m, json, sys, sysconfig
def v(n):
    try: return m.version(n)
    except m.PackageNotFoundError: return None
p = sysconfig.get_paths()
print(json.dumps({"executable": sys.executable, "venv": sys.prefix != sys.base_prefix,
    "pip": v("pip"), "torch": v("torch"),
    "python": sys.version.split()[0], "site": sorted({p["purelib"], p["platlib"]})}))
"""


def op_bootstrap(request: Answer, _: Input) -> Answer:
    """Makes the virtual environment `venv` with `requirements` from the Python `base`, or sees that it is there.

    A `base` that has torch lends it: the environment sees the packages of `base`, and pip may not replace its torch.
    `env` is set for pip besides the host's own environment. What pip says comes as `say`.
    """
    venv, requirements, env = whole(request["venv"]), request["requirements"], request["env"]
    make_directories(os.path.dirname(venv))

    def open_lock() -> int:
        return os.open(venv + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    held = lock(open_lock, lambda: os.lstat(venv + ".lock"), "this environment")
    try:
        return _bootstrap(venv, request["base"], requirements, {**os.environ, **env})
    finally:
        os.close(held)


def _bootstrap(venv: str, base: str, requirements: list[str], env: dict[str, str]) -> Answer:
    python, record = os.path.join(venv, "bin", "python"), venv + ".json"
    before: Answer = {}
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(Path(record).read_bytes())
        before = value if isinstance(value, dict) else {}
    itself = os.path.abspath(os.path.expanduser(base)) == python
    if itself and before.get("base"):
        base, itself = before["base"], False
    found = _probe(base, env)
    if tuple(map(int, found["python"].split(".")[:2])) < (3, 11):
        raise Refused(f"{base} is Python {found['python']}, expected 3.11 or newer")
    own_torch = found["torch"]
    # A pip that can work on other environments spares making one, which some systems cannot without more packages.
    lent = not itself and tuple(map(int, re.findall(r"\d+", found["pip"] or "0")[:2])) >= (22, 3)
    wanted = [each for each in requirements if not (own_torch and re.match(r"torch\b(?!-)", each))]
    made = {"base": base, "python_version": found["python"], "own_torch": own_torch}
    before, needs = {key: before.get(key) for key in (*made, "installed")}, sorted(requirements)
    if before == {**made, "installed": needs} and os.access(python, os.X_OK):
        return {"python": python, "made": False, **made}
    same = all(before[key] == made[key] for key in made) and os.access(python, os.X_OK)
    if not itself:
        _write_json(record, made)
    if not itself and not same:
        say(say=f"making {venv} from {base} (Python {found['python']})")
        options = ["--clear", *(["--system-site-packages"] if own_torch else []), *(["--without-pip"] if lent else [])]
        _tell([found["executable"], "-m", "venv", *options, venv], env, "venv")
    if own_torch and found["venv"] and not itself:
        # The system's packages of an environment are those of its interpreter, not those of another environment.
        site = _probe(python, env)["site"][0]
        Path(site, "kdconsole-base.pth").write_text("".join(each + "\n" for each in found["site"]))
    pip = [found["executable"], "-m", "pip", "--python", python] if lent else [python, "-m", "pip"]
    install = [*pip, "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    constraint = venv + ".constraints.txt"
    Path(constraint).write_text(f"torch=={own_torch}\n" if own_torch else "")
    if own_torch:
        say(say=f"keeping the torch {own_torch} of {base}")
    _tell([*install, "--constraint", constraint, *wanted], env, "pip")
    _write_json(record, {**made, "installed": needs})
    return {"python": python, "made": True, **made}


def _probe(python: str, env: dict[str, str]) -> Answer:
    try:
        done = subprocess.run(
            [os.path.expanduser(python), "-c", VENV_PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env=env,
            check=False,
        )
        found: Answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise Refused(f"{python}: is no Python that runs: {_reason(error)}") from None
    return found


def _tell(command: list[str], env: dict[str, str], what: str) -> None:
    """Runs a command, passes its lines on, and ends it when nobody listens any more."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )
    assert process.stdout is not None
    output, rest, last = process.stdout.fileno(), b"", ""
    try:
        while True:
            ready = select.select([output], [], [], BUSY_SECONDS)[0]
            data = os.read(output, 1 << 16) if ready else b""
            if ready and not data:
                break
            if not ready:
                say(alive=what)  # also how we hear that the console is gone: the pipe is broken then
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-10_000:]
            for line in lines:
                text = line.decode(errors="replace").rstrip()[:1000]
                if text and not text.startswith("Requirement already satisfied"):
                    last = text if not text.startswith("[notice]") else last
                    say(say=text)
        if process.wait() != 0:
            raise Refused(f"{what} ended with code {process.returncode}: {last}")
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait()


# The whole


def load(modules: list[list[str]]) -> None:
    """More files that travel with a request, as [module's name, source]; their OPERATIONS join those here."""
    sys.modules["dispatch.host_tool"] = sys.modules[__name__]
    for name, text in modules:
        module = sys.modules[name] = ModuleType(name)
        exec(compile(text, name, "exec"), vars(module))
        OPERATIONS.update(module.OPERATIONS)


OPERATIONS: dict[str, Callable[[Answer, Input], Answer]] = {
    "hash": op_hash,
    "tree": op_tree,
    "send": op_send,
    "receive": op_receive,
    "place": op_place,
    "facts": op_facts,
    "bootstrap": op_bootstrap,
}


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:1000]


def main() -> int:
    """Carries out one request."""
    source = Input()
    try:
        request = source.line()
        load(request.get("modules", []))
        operation = OPERATIONS.get(str(request.get("op")))
        if operation is None:
            raise Refused(f"{request.get('op')!r}: no such operation")
        say(**operation(request, source), done=True)
    except BrokenPipeError:
        _silent()
    except Refused as error:
        return _fail(str(error))
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
        return _fail(f"{name}: {_reason(error)}" if name else _reason(error), error.errno)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        return _fail(f"a request that cannot be read: {type(error).__name__}: {error}")
    return 0


def _fail(text: str, number: int | None = None) -> int:
    try:
        say(error=text[:2000], errno=errno.errorcode.get(number) if number else None)
    except OSError:
        _silent()
    return 1


def _silent() -> NoReturn:
    os._exit(1)  # nobody listens; Python would complain about standard output once more


if __name__ == "__main__":
    sys.exit(main())
