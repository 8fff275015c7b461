"""The one hierarchy of errors that a user can cause, and the exit codes that they end in."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process exit status means, for every command and for the engine itself."""

    OK = 0
    """Every fatal and gate verdict is PASS."""
    FAILED = 1
    """A fatal or gate verdict is FAIL, or an ended run's files no longer agree with their checksums."""
    USAGE = 2
    """Wrong usage, configuration, model or data: nothing was trained."""
    CONNECTION = 3
    """The host could not be reached."""
    TIMEOUT = 4
    """A time-out or a stall, a budget that ended the run before its tenth step included."""
    UNDECIDED = 5
    """The run crashed, or a fatal or gate verdict is still PENDING or UNKNOWN."""
    INTERRUPTED = 130
    """Stopped by SIGINT or SIGTERM."""


class KdError(Exception):
    """An error with one clear message and no traceback.

    Args:
        what: what is wrong, with which value, of which file, key or host.
        expected: what would have been right.
        do: what to do next.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, what: str, *, expected: str | None = None, do: str | None = None) -> None:
        parts = [what]
        if expected:
            parts.append(f"expected {expected}")
        if do:
            parts.append(do)
        super().__init__("; ".join(parts))


class ConfigError(KdError):
    """A configuration file, `--set` option or `KDCONSOLE_…` variable is wrong."""


class ModelError(KdError):
    """A model or tokenizer directory cannot be used as teacher or student."""


class DataError(KdError):
    """The corpus is unreadable, empty or degenerate."""


class StreamError(KdError):
    """The training stream cannot be read: unknown version, broken line, another run's file."""

    exit_code = ExitCode.UNDECIDED


class RunError(KdError):
    """A run cannot be created, started, found or stopped."""


class StallError(KdError):
    """Nothing was heard from the run for too long."""

    exit_code = ExitCode.TIMEOUT
