"""What a process does to itself before it runs what nobody trusts: namespaces, a file system, limits, Landlock, filter.

Every wall is a function that raises OSError where the platform does not give it; which ones are used is decided before,
by trying (`engine.sandbox_containment`). Here a wall that is wanted and not given ends the process.

Standard library only: this runs inside the sandbox. Sources: the manual pages of namespaces(7), user_namespaces(7),
pivot_root(2), mount_setattr(2), landlock(7), seccomp(2), capabilities(7), and linux/landlock.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import struct
from collections.abc import Iterable
from typing import Final

from engine import sandbox_seccomp

USER_NAMESPACE: Final = "user namespace"
PID_NAMESPACE: Final = "pid namespace"
NETWORK_NAMESPACE: Final = "network namespace"
IPC_NAMESPACE: Final = "ipc namespace"
OWN_FILES: Final = "own file system"
OTHER_USER: Final = "other user"
LANDLOCK: Final = "landlock"
SECCOMP: Final = "seccomp"
WALLS: Final = (
    USER_NAMESPACE,
    PID_NAMESPACE,
    NETWORK_NAMESPACE,
    IPC_NAMESPACE,
    OWN_FILES,
    OTHER_USER,
    LANDLOCK,
    SECCOMP,
)
"""In the order in which they are tried; limits, no_new_privs and the end of all capabilities stand always."""

NOBODY: Final = 65534
HOME: Final = "/scratch"
"""The program's directory in a file system of its own."""
_DISK: Final = "size=16m,nr_inodes=1024,mode=777"
_DEVICES: Final = ("/dev/null", "/dev/urandom")
_OPEN_FILES: Final = 64

_NEW_NS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x2_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH: Final = 2
_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}
_CAPSET: Final = {"x86_64": 126, "aarch64": 91}
_MOUNT_SETATTR, _RULESET, _RULE, _RESTRICT = 442, 444, 445, 446  # the same on every machine
_CAPABILITIES_3: Final = 0x2008_0522
_PR_PDEATHSIG, _PR_DUMPABLE, _PR_SECCOMP, _PR_CAPBSET_DROP, _PR_NO_NEW_PRIVS, _PR_AMBIENT = 1, 4, 22, 24, 38, 47

_C: Final = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, what: str, *arguments: object) -> int:
    return _checked(_C.syscall(ctypes.c_long(number), *arguments), what)


def _prctl(option: int, value: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_C.prctl(option, ctypes.c_ulong(value), zero, zero, zero), what)


def die_with_parent(number: int) -> None:
    """This signal when the parent's thread that started us ends; to be asked after every change of who we are."""
    _prctl(_PR_PDEATHSIG, number, "death signal")


def hide() -> None:
    """Nobody of the same user can attach to this process or read its memory."""
    _prctl(_PR_DUMPABLE, 0, "not dumpable")


def own_users() -> None:
    """A user namespace, in which one user is nobody, who is the caller outside."""
    user, group = os.geteuid(), os.getegid()
    _checked(_C.unshare(_NEW_USER), USER_NAMESPACE)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def own_processes() -> None:
    """Processes started from now on are in a namespace of their own, which ends with the first of them."""
    _checked(_C.unshare(_NEW_PID), PID_NAMESPACE)


def own_network() -> None:
    """No interface but a loopback of its own, which is down."""
    _checked(_C.unshare(_NEW_NET), NETWORK_NAMESPACE)


def own_ipc() -> None:
    """No shared memory, semaphores or queues of others."""
    _checked(_C.unshare(_NEW_IPC), IPC_NAMESPACE)


def own_files(scratch: str, reads: Iterable[str], hidden: Iterable[str]) -> None:
    """A root with what is to be read, read-only, and `HOME`, 16 MiB in memory; nothing else is there, not even /proc.

    Args:
        scratch: an empty directory to build it on; nothing is left there.
        reads: absolute paths; those that do not exist are left out.
        hidden: directories below `reads` that are empty there.
    """
    _checked(_C.unshare(_NEW_NS), OWN_FILES)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
    _mount("tmpfs", scratch, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    there = [path for path in reads if os.path.exists(path)]
    for path in (*there, *_DEVICES):
        target = scratch + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o644))
        _mount(path, target, None, _MS_BIND | _MS_REC, None)
        _lock(target, _ATTR_RDONLY | _ATTR_NOSUID | (0 if path in _DEVICES else _ATTR_NODEV), recursive=True)
    for path in hidden:
        if os.path.isdir(scratch + path):
            _mount("tmpfs", scratch + path, "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=4k,mode=755")
    for name in ("lib", "lib64", "lib32"):  # where the loader is looked for, links into /usr on most systems
        if os.path.islink("/" + name) and not os.path.lexists(f"{scratch}/{name}"):
            os.symlink(os.readlink("/" + name), f"{scratch}/{name}")
    os.makedirs(scratch + HOME, exist_ok=True)
    _mount("tmpfs", scratch + HOME, "tmpfs", _MS_NOSUID | _MS_NODEV, _DISK)
    os.chdir(scratch)
    _syscall(_PIVOT_ROOT[os.uname().machine], OWN_FILES, b".", b".")
    _checked(_C.umount2(b".", _MNT_DETACH), OWN_FILES)
    _lock("/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, recursive=False)
    os.chdir(HOME)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _checked(_C.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"{OWN_FILES}: {target}")


def _lock(target: str, attributes: int, *, recursive: bool) -> None:
    """Adds attributes to a mount; takes none away, so that a user namespace may do it."""
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(len(wanted))
    _syscall(
        _MOUNT_SETATTR, OWN_FILES, ctypes.c_int(_AT_FDCWD), os.fsencode(target), ctypes.c_uint(flags), wanted, size
    )


def limit(*, cpu_seconds: int, memory_bytes: int, file_bytes: int, processes: int) -> None:
    """What it may use at most. The last second of CPU time ends in SIGKILL, which even the first process of a
    namespace cannot ignore."""
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, _OPEN_FILES),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def no_new_privileges() -> None:
    """No program that this process could start gains anything by its owner or its capabilities."""
    _prctl(_PR_NO_NEW_PRIVS, 1, "no new privileges")


def other_user() -> None:
    """From root to nobody, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def bound_capabilities() -> None:
    """None can come back; only who has them can ask for that, and it changes nothing for others."""
    for number in range(64):
        with contextlib.suppress(OSError):
            _prctl(_PR_CAPBSET_DROP, number, "capabilities")


def drop_capabilities() -> None:
    """Not one is left, those that a user namespace gives included."""
    with contextlib.suppress(OSError):  # kernels before 4.3 have none of these
        _prctl(_PR_AMBIENT, 4, "ambient capabilities")
    header = struct.pack("=Ii", _CAPABILITIES_3, 0)
    _syscall(_CAPSET[os.uname().machine], "capabilities", header, bytes(24))


# Landlock's rights on files, by the version that brought them.
_FILE_RIGHTS: Final = ((1, 0x1FFF), (2, 0x2000), (3, 0x4000), (5, 0x8000))
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 0x2, 0x4, 0x8, 0x4000
_IN_HOME: Final = 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x80 | 0x100 | 0x2000 | 0x4000
"""Write, read, list, remove, make directories and regular files, rename, truncate."""
_RULE_PATH_BENEATH: Final = 1


def landlock_version() -> int:
    """The ABI that the kernel speaks; OSError where it has no Landlock or does not use it."""
    return _syscall(_RULESET, LANDLOCK, None, ctypes.c_size_t(0), ctypes.c_uint(1))


def landlock(reads: Iterable[str], home: str, *, writes: bool) -> None:
    """Files can be read below `reads` and `home`, and written below `home` where `writes`; no TCP port, and no signal
    to a process outside, as far as the kernel's version goes."""
    version = landlock_version()
    handled = 0
    for since, bits in _FILE_RIGHTS:
        handled |= bits if version >= since else 0
    attributes = struct.pack("=Q", handled)
    if version >= 4:
        attributes += struct.pack("=Q", 3)  # bind and connect
    if version >= 6:
        attributes += struct.pack("=Q", 3)  # abstract sockets and signals
    rules = _syscall(_RULESET, LANDLOCK, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    try:
        for path in reads:
            _allow(rules, path, (_READ_FILE | _READ_DIR) & handled)
        _allow(rules, "/dev/urandom", _READ_FILE)
        _allow(rules, "/dev/null", (_READ_FILE | _WRITE_FILE | _TRUNCATE) & handled)
        _allow(rules, home, (_IN_HOME if writes else _READ_FILE | _READ_DIR) & handled)
        _syscall(_RESTRICT, LANDLOCK, ctypes.c_int(rules), ctypes.c_uint(0))
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights, place)
        _syscall(_RULE, LANDLOCK, ctypes.c_int(rules), ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint(0))
    finally:
        os.close(place)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def seccomp(*, writes: bool) -> None:
    """The filter of system calls; files can only be read unless `writes`."""
    code = sandbox_seccomp.program(os.uname().machine, files=writes)
    if code is None:
        raise OSError(errno.ENOSYS, f"{SECCOMP}: the system calls of {os.uname().machine} are not known here")
    whole = _Program(len(code) // 8, code)
    zero = ctypes.c_ulong(0)
    _checked(_C.prctl(_PR_SECCOMP, ctypes.c_ulong(2), ctypes.byref(whole), zero, zero), SECCOMP)
