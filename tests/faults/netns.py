"""A host in a network of its own, behind a cable that can be cut: what only real packets that get lost can show."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_numbers = itertools.count()


@functools.cache
def why_not() -> str | None:
    """Why no such network can be made here; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    try:
        with network():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        return f"no network namespace can be made here: {str(said).strip()[:200]}"


@dataclass(frozen=True)
class Network:
    """A network namespace and the cable to it."""

    name: str
    here: str
    """The cable's end here."""
    there: str
    us: str
    host: str
    """Addresses of both ends."""

    @property
    def inside(self) -> tuple[str, ...]:
        """What a command is begun with to be run there; its files stay those of here."""
        return ("nsenter", f"--net=/run/netns/{self.name}")

    def cut(self) -> None:
        """Nothing that the host sends arrives any more, and it takes note of nothing. Neither side is told."""
        _ip("-n", self.name, "route", "add", "blackhole", f"{self.us}/32")

    def mend(self) -> None:
        """Packets arrive again."""
        _ip("-n", self.name, "route", "del", "blackhole", f"{self.us}/32")

    def unplug(self) -> None:
        """The cable is out; the host sees that, we do not route any other way."""
        _ip("-n", self.name, "link", "set", self.there, "down")

    def plug(self) -> None:
        """The cable is in again."""
        _ip("-n", self.name, "link", "set", self.there, "up")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network while inside; its host has the address `host`."""
    mark = f"{os.getpid() % 100_000}{next(_numbers) % 100}"
    subnet = f"10.{200 + int(mark) // 254 % 50}.{int(mark) % 254 + 1}"
    net = Network(f"kd{mark}", f"kh{mark}", f"kt{mark}", f"{subnet}.1", f"{subnet}.2")
    _ip("netns", "add", net.name)
    try:
        _ip("link", "add", net.here, "type", "veth", "peer", "name", net.there, "netns", net.name)
        _ip("addr", "add", f"{net.us}/30", "dev", net.here)
        _ip("link", "set", net.here, "up")
        _ip("-n", net.name, "addr", "add", f"{net.host}/30", "dev", net.there)
        for link in ("lo", net.there):
            _ip("-n", net.name, "link", "set", link, "up")
        yield net
    finally:
        for undo in (("link", "del", net.here), ("netns", "del", net.name)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*undo)


def _ip(*arguments: str) -> None:
    path = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin:" + os.environ.get("PATH", "")}
    subprocess.run(["ip", *arguments], check=True, capture_output=True, env=path)


# Pids


_TAKE = """
import ctypes, os, sys
class Args(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in (
        "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls", "set_tid",
        "set_tid_size", "cgroup")]
wanted = (ctypes.c_int32 * 1)(int(sys.argv[1]))
args = Args(exit_signal=17, set_tid=ctypes.addressof(wanted), set_tid_size=1)
libc = ctypes.CDLL(None, use_errno=True)
made = libc.syscall(435, ctypes.byref(args), ctypes.sizeof(args))
if made < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
if made == 0:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)  # whoever reads from the maker would wait for this one, too
    os.execlp("sleep", "sleep", "600")
print(made)
"""
"""A process with exactly this pid, by clone3 with set_tid; it outlives whoever made it."""


@contextlib.contextmanager
def somebody_else(pid: int) -> Iterator[None]:
    """An innocent process with this pid, which must be free, while inside.

    Raises:
        OSError: the pid is taken, or the kernel lets nobody choose.
    """
    taken = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TAKE, str(pid)], capture_output=True, timeout=30, check=False
    )
    if taken.returncode != 0:
        raise OSError(taken.stderr.decode(errors="replace").strip()[-200:])
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


@functools.cache
def why_no_pid() -> str | None:
    """Why no process can be given a pid of our choice here; None where it can."""
    free = subprocess.Popen(["true"])
    free.wait()
    try:
        with somebody_else(free.pid):
            assert Path(f"/proc/{free.pid}/cmdline").exists()
            return None
    except OSError as error:
        return f"no process can be given a chosen pid here: {error}"
