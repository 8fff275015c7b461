"""Keeps one process of the sandbox: makes it, walls it in, waits for it, ends it when told or when nobody is left.

The keeper itself never runs anything but this. It starts the contained process (which, in a pid namespace, is the first
and takes all others with it), and ends it with SIGKILL on SIGTERM, on the death of the evaluator, and on a clock of its
own. What it says goes over a pipe that the contained process closes before it runs anything else.

Standard library only: this runs inside the sandbox.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import sys
from types import FrameType
from typing import Any, Final, NoReturn

from engine import sandbox_roles, sandbox_walls
from engine.sandbox_walls import (
    IPC_NAMESPACE,
    LANDLOCK,
    NETWORK_NAMESPACE,
    OTHER_USER,
    OWN_FILES,
    PID_NAMESPACE,
    SECCOMP,
    USER_NAMESPACE,
)

_GRACE_SECONDS: Final = 3.0
"""So long after the evaluator's own clock the keeper ends it by itself."""
_INLET, _OUTLET, _VERDICT, _REPORT, _ALIVE = 3, 4, 5, 6, 7
"""Descriptors of the contained process; the last two are closed before it runs anything."""
_ENDING: Final = {signal.SIGTERM, signal.SIGALRM}


def main() -> NoReturn:
    """Reads what to do from its standard input, as JSON; ends with status 0 once the process is gone and reported."""
    spec: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    report: int = spec["report"]
    try:
        pid, alive = _start(spec)
    except OSError as problem:
        _say(report, {"trouble": str(problem)})
        os._exit(1)
    for descriptor in spec["descriptors"]:
        os.close(descriptor)

    told = False

    def end(_signal: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        os.kill(pid, signal.SIGKILL)  # it is not waited for yet: the number is its own

    for number in _ENDING:
        signal.signal(number, end)
    signal.setitimer(signal.ITIMER_REAL, spec["wall_seconds"] + _GRACE_SECONDS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    _, status, usage = os.wait4(pid, 0)
    os.close(alive)
    _say(
        report,
        {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            "status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
            "told": told,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        },
    )
    os._exit(0)


def _start(spec: dict[str, Any]) -> tuple[int, int]:
    """Starts the contained process; returns its number and the pipe by which it sees that the keeper lives."""
    walls = spec["walls"]
    if USER_NAMESPACE in walls:
        sandbox_walls.own_users()
    if PID_NAMESPACE in walls:
        sandbox_walls.own_processes()
    sandbox_walls.hide()
    sandbox_walls.die_with_parent(signal.SIGTERM)
    if os.getppid() != spec["evaluator"]:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    seen, alive = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(alive)
        _contained(spec, seen)
    os.close(seen)
    return pid, alive


def _contained(spec: dict[str, Any], seen: int) -> NoReturn:
    """The life of the contained process."""
    try:
        inlet, outlet, verdict = _arrange(spec, seen)
        try:
            _wall_in(spec)
            if spec["role"] == "trial":
                _try_walls(spec["walls"])
        except (OSError, ImportError) as problem:
            _say(_REPORT, {"trouble": str(problem)})
            os._exit(1)
        _say(_REPORT, {"ready": True})
        os.close(_REPORT)
        os.close(_ALIVE)
        if spec["role"] == "answer":
            sandbox_roles.answer(spec["source"], spec["entry_point"], inlet, outlet)
        elif spec["role"] == "checker":
            sandbox_roles.tell(
                verdict, sandbox_roles.check(spec["prompt"], spec["test"], spec["entry_point"], inlet, outlet)
            )
    finally:
        os._exit(0)


def _arrange(spec: dict[str, Any], seen: int) -> tuple[int, int, int]:
    """Its descriptors in their places, every other one closed, signals as they were."""
    wanted = [*spec["descriptors"], spec["report"], seen]
    high = [_high(descriptor) for descriptor in wanted]
    empty = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(empty, descriptor)
    os.closerange(3, 100)
    for place, descriptor in zip((*range(_INLET, _INLET + len(high) - 2), _REPORT, _ALIVE), high, strict=True):
        os.dup2(descriptor, place, inheritable=False)
    os.closerange(_ALIVE + 1, max(*wanted, *high, empty) + 1)  # the evaluator passed nothing else on
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return _INLET, _OUTLET, _VERDICT


def _high(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100)


def _wall_in(spec: dict[str, Any]) -> None:
    walls, reads = spec["walls"], spec["reads"]
    if NETWORK_NAMESPACE in walls:
        sandbox_walls.own_network()
    if IPC_NAMESPACE in walls:
        sandbox_walls.own_ipc()
    own = OWN_FILES in walls
    if own:
        sandbox_walls.own_files(spec["scratch"], reads, spec["hidden"])
    else:
        os.chdir(spec["scratch"])
    sandbox_walls.bound_capabilities()
    sandbox_walls.no_new_privileges()
    if LANDLOCK in walls:
        sandbox_walls.landlock(reads, sandbox_walls.HOME if own else spec["scratch"], writes=own)
    sandbox_walls.limit(**spec["limits"])
    if OTHER_USER in walls:
        sandbox_walls.other_user()
    sandbox_walls.drop_capabilities()
    sandbox_walls.hide()
    sandbox_walls.die_with_parent(signal.SIGKILL)
    os.set_blocking(_ALIVE, False)
    try:
        os.read(_ALIVE, 1)  # the end of the pipe: the keeper died before it was asked for a signal
    except BlockingIOError:
        pass
    else:
        os._exit(1)
    if SECCOMP in walls:
        sandbox_walls.seccomp(writes=own)


def _try_walls(walls: list[str]) -> None:
    """Whether Python still finds its library behind these walls, and whether they are there."""
    import hashlib
    import random

    random.Random(0)
    hashlib.sha256(b"")
    if PID_NAMESPACE in walls and os.getpid() != 1:
        raise OSError(errno.EPROTO, f"{PID_NAMESPACE}: not the first process in it")
    if OTHER_USER in walls and 0 in os.getresuid():
        raise OSError(errno.EPROTO, f"{OTHER_USER}: still root")
    if OWN_FILES in walls and os.path.exists("/proc/self"):
        raise OSError(errno.EPROTO, f"{OWN_FILES}: the old one is still there")
    if LANDLOCK in walls:
        _refused(LANDLOCK, lambda: os.listdir("/"))
    if SECCOMP in walls:
        _refused(SECCOMP, lambda: os.kill(os.getpid(), 0))
        _refused(SECCOMP, lambda: os.chmod(".", 0o700))


def _refused(wall: str, attempt: Any) -> None:
    try:
        attempt()
    except PermissionError:
        return
    raise OSError(errno.EPROTO, f"{wall}: it does not hold")


def _say(report: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody is left to hear it
        os.write(report, json.dumps(message).encode("ascii") + b"\n")
