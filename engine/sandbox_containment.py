"""Which walls this machine gives, found by trying each, and whether they are enough to run code that nobody trusts.

Standard library only, no torch.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.sandbox_process import Contained, Limits, SandboxError, Scratch
from engine.sandbox_walls import (
    IPC_NAMESPACE,
    LANDLOCK,
    NETWORK_NAMESPACE,
    OTHER_USER,
    OWN_FILES,
    PID_NAMESPACE,
    SECCOMP,
    USER_NAMESPACE,
    WALLS,
)

_TRIAL_SECONDS: Final = 20.0
_NAMESPACES: Final = {PID_NAMESPACE, NETWORK_NAMESPACE, IPC_NAMESPACE, OWN_FILES}
_WHAT_TO_DO: Final = (
    "run the evaluation on a Linux host with kernel 5.12 or later on x86_64 or aarch64, or allow this container seccomp"
)


@dataclass(frozen=True)
class Containment:
    """What this machine gives."""

    walls: tuple[str, ...]
    """Of `engine.sandbox_walls.WALLS`; each was tried together with those before it."""
    missing: tuple[str, ...]
    """What is not there, each with what that means; to be said loudly."""
    sufficient: bool
    """A program can neither signal others, nor write outside, nor outlive us."""
    reason: str
    """Why it is not sufficient; empty where it is. What to do is `do`."""
    do: str = ""


@functools.cache
def containment() -> Containment:
    """Tries every wall, once a process; takes about a tenth of a second where all stand."""
    if sys.platform != "linux":
        return judge((), os.name == "posix" and os.geteuid() == 0, f"{sys.platform} has none of the walls it takes")
    root = os.geteuid() == 0
    wanted = tuple(wall for wall in WALLS if wall != (USER_NAMESPACE if root else OTHER_USER))
    if _stand(wanted) is None:
        return judge(wanted, root)
    if (why := _stand(())) is not None:
        return judge((), root, why)
    found: tuple[str, ...] = ()
    for wall in wanted:
        if _stand((*found, wall)) is None:
            found = (*found, wall)
    if not _NAMESPACES & set(found):  # of itself it keeps nobody from anything
        found = tuple(wall for wall in found if wall != USER_NAMESPACE)
    return judge(found, root)


def _stand(walls: Sequence[str]) -> str | None:
    """Why these walls do not stand together; None where they do and Python finds its library behind them."""
    scratch = Scratch()
    try:
        trial = Contained("trial", walls, Limits(cpu_seconds=10), scratch)
        try:
            trial.begin()
            trial.wait(_TRIAL_SECONDS)
        finally:
            ended = trial.end()
    except SandboxError as error:
        return str(error)
    finally:
        scratch.remove()
    return "its Python does not start in time" if ended.told else None


def judge(walls: Sequence[str], root: bool, why: str | None = None) -> Containment:
    """What a set of walls is worth.

    Args:
        walls: those that stand.
        root: whether the evaluator is root.
        why: why nothing can be run whatever stands.
    """
    there = set(walls)
    filtered = SECCOMP in there
    missing: list[str] = []
    if not filtered:
        missing.append("no seccomp: a program can make every system call of the kernel")
    if NETWORK_NAMESPACE not in there:
        missing.append(
            "no network namespace: only seccomp keeps a program from the network"
            if filtered
            else "no network namespace and no seccomp: a program can reach the network"
        )
    if PID_NAMESPACE not in there:
        missing.append(
            "no pid namespace: only seccomp keeps a program from other processes"
            if filtered
            else "no pid namespace and no seccomp: a program can signal other processes, and outlive the evaluation"
        )
    if OWN_FILES not in there:
        missing.append(
            "no file system of its own: a program can write no file, its temporary ones included"
            if filtered
            else "no file system of its own and no seccomp: a program can change files of this user"
        )
        if LANDLOCK not in there:
            missing.append("no Landlock either: a program can read every file that this user can read")
    elif LANDLOCK not in there:
        missing.append("no Landlock: only the file system of its own keeps a program from files")
    if root and OTHER_USER not in there:
        missing.append("no other user: a program is root, without any capability")
    enough = filtered or {PID_NAMESPACE, OWN_FILES} <= there
    if why is None and not enough:
        why = "; ".join(text for text in missing if "signal" in text or "change files" in text)
    if why is None:
        return Containment(tuple(walls), tuple(missing), True, "")
    return Containment(tuple(walls), tuple(missing), False, why, _WHAT_TO_DO)
