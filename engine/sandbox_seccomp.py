"""The filter of system calls: a list of what a Python program needs, and nothing else, as BPF for seccomp.

What is not on the list fails with EPERM: fork, execve, kill, socket, ptrace, mount, chmod, io_uring and whatever a
later kernel brings. A call of another architecture (i386 or x32 on x86_64) ends the process.

Standard library only: this runs inside the sandbox. Sources: linux/seccomp.h, linux/filter.h, the system call tables of
x86_64 (`asm/unistd_64.h`) and aarch64 (`asm-generic/unistd.h`).
"""

from __future__ import annotations

import errno
import struct
from typing import Final

_ARCHITECTURES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine: its column of the tables below, and its AUDIT_ARCH."""
_X32: Final = 0x4000_0000
"""The first number of a call through the x32 interface of x86_64."""

# name: number on x86_64 and aarch64; None where it has no such call.
_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    # what is open already
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "select": (23, None),
    "pselect6": (270, 72),
    "poll": (7, None),
    "ppoll": (271, 73),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "close_range": (436, 436),
    # files by name, to look at
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "umask": (95, 166),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "mincore": (27, 232),
    "madvise": (28, 233),
    # itself: its signals, its clocks, who it is
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "pause": (34, None),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
    "getcpu": (309, 168),
    "arch_prctl": (158, None),
    # threads
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_FILE_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "open": (2, None),
    "openat": (257, 56),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
}
"""Where the program has a file system of its own. Elsewhere files are opened to be read, and nothing else."""
_OPENS: Final = ((("open", 1), ((2, None))), (("openat", 2), ((257, 56))))
_CLONE: Final = (56, 220)
_FCNTL: Final = (72, 25)
_IOCTL: Final = (16, 29)
_PRCTL: Final = (157, 167)
_PRLIMIT: Final = (302, 261)
_UNKNOWN: Final = ((435, 435), (437, 437), (439, 439))
"""clone3, openat2 and faccessat2: their arguments lie in memory, where a filter cannot look; libraries fall back."""

_CLONE_THREAD: Final = 0x0001_0000
_NEW_NAMESPACES: Final = 0x7E02_0000
_WRITING: Final = 0x0040_0243
"""Bits of the flags of open: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, and what O_TMPFILE has besides O_DIRECTORY."""
_FCNTL_COMMANDS: Final = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
"""Duplicate, flags, locks, size of a pipe; never F_SETOWN or F_SETSIG, which send any signal to any process."""
_IOCTL_REQUESTS: Final = (0x5401, 0x5413, 0x5450, 0x5451)
"""Is it a terminal and how wide, close on exec; never TIOCSTI, which types into one."""
_PRCTL_OPTIONS: Final = (15, 16, 0x5356_4D41)
"""The name of a thread and of a piece of memory; never the death signal."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW: Final = 0x7FFF_0000
_KILL: Final = 0x8000_0000
_ERROR: Final = 0x0005_0000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Places in struct seccomp_data; the low half of an argument comes first on both machines."""


def program(machine: str, *, files: bool) -> bytes | None:
    """The filter as an array of struct sock_filter; None for a machine whose calls are not known here.

    Args:
        machine: as `os.uname` says it.
        files: whether files may be written, made and deleted: only where others hold the program to its own.
    """
    if machine not in _ARCHITECTURES:
        return None
    column, architecture = _ARCHITECTURES[machine]
    code = [_word(_LOAD, _ARCHITECTURE), _word(_EQUAL, architecture, 1, 0), _word(_RETURN, _KILL)]
    code.append(_word(_LOAD, _NUMBER))
    if machine == "x86_64":
        code += [_word(_AT_LEAST, _X32, 0, 1), _word(_RETURN, _KILL)]
    calls = _CALLS | (_FILE_CALLS if files else {})
    for numbers in calls.values():
        code += _rule(numbers[column], [_word(_RETURN, _ALLOW)])
    if not files:
        for (_, place), numbers in _OPENS:
            code += _rule(numbers[column], [*_low(place), *_unless(_ANY_BIT, _WRITING)])
    for numbers in _UNKNOWN:
        code += _rule(numbers[column], [_word(_RETURN, _ERROR | errno.ENOSYS)])
    thread = [*_low(0), *_unless(_ANY_BIT, _NEW_NAMESPACES, ends=False), _word(_ANY_BIT, _CLONE_THREAD, 0, 1)]
    code += _rule(_CLONE[column], [*thread, _word(_RETURN, _ALLOW), _word(_RETURN, _ERROR | errno.EPERM)])
    for number, place, wanted in (
        (_FCNTL[column], 1, _FCNTL_COMMANDS),
        (_IOCTL[column], 1, _IOCTL_REQUESTS),
        (_PRCTL[column], 0, _PRCTL_OPTIONS),
    ):
        body = _low(place)
        for value in wanted:
            body += [_word(_EQUAL, value, 0, 1), _word(_RETURN, _ALLOW)]
        code += _rule(number, [*body, _word(_RETURN, _ERROR | errno.EPERM)])
    # prlimit64 may read limits, its own: no new ones (a null pointer, both halves) and process 0
    asks = [*_low(0), _word(_EQUAL, 0, 1, 0), _word(_RETURN, _ERROR | errno.EPERM)]
    asks += [*_low(2), _word(_EQUAL, 0, 1, 0), _word(_RETURN, _ERROR | errno.EPERM)]
    asks += [_word(_LOAD, _ARGUMENTS + 2 * 8 + 4), _word(_EQUAL, 0, 0, 1), _word(_RETURN, _ALLOW)]
    code += _rule(_PRLIMIT[column], [*asks, _word(_RETURN, _ERROR | errno.EPERM)])
    return b"".join([*code, _word(_RETURN, _ERROR | errno.EPERM)])


def _rule(number: int | None, body: list[bytes]) -> list[bytes]:
    """Instructions for one call; they end in a return, since they load something else than its number."""
    return [] if number is None else [_word(_EQUAL, number, 0, len(body)), *body]


def _unless(test: int, value: int, *, ends: bool = True) -> list[bytes]:
    """EPERM where the test holds, and otherwise on, or allowed where that `ends` it."""
    refused = [_word(test, value, 0, 1), _word(_RETURN, _ERROR | errno.EPERM)]
    return [*refused, _word(_RETURN, _ALLOW)] if ends else refused


def _low(place: int) -> list[bytes]:
    return [_word(_LOAD, _ARGUMENTS + place * 8)]


def _word(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
