"""Runs programs that nobody trusts, and says whether they solve their problem. What holds them: docs/sandbox.md.

Two processes a program, each behind its own walls. One runs prompt and answer; the other runs the test, calls the
answer's function over a pipe that carries plain data only, and has a pipe of its own for the verdict. So a program can
say what its function returns, and nothing about whether that is right.

Standard library only, no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from types import TracebackType
from typing import Final, TypeVar

from engine.sandbox_containment import Containment, containment
from engine.sandbox_process import Contained, Ended, Limits, SandboxError, Scratch
from engine.text import clean

__all__ = [
    "Containment",
    "Limits",
    "Outcome",
    "Program",
    "Sandbox",
    "SandboxError",
    "containment",
]

POLL_SECONDS: Final = 0.2
_DETAIL: Final = 500
_DYING_SECONDS: Final = 0.5
_MAX_VERDICT: Final = 1 << 14
_DESCRIPTORS: Final = 14
"""Of the evaluator, at most, while a program starts: three pipes, and for each process its input and its report."""
_SPARE_DESCRIPTORS: Final = 32
_OUTCOMES: Final = ("passed", "wrong", "error", "memory", "gone")
"""What a checker can say; `time` and how a process went are seen from outside."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Program:
    """One answer to one problem."""

    prompt: str
    """Source text that ends inside the function that is to be completed."""
    completion: str
    """The answer, put directly behind the prompt."""
    test: str
    """Defines `check(candidate)`, which raises where the function is wrong."""
    entry_point: str


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    passed: bool
    outcome: str
    """passed, wrong (the test was not satisfied), error (the answer raised, or said what is no result), time, memory,
    gone (its process ended)."""
    detail: str
    """The exception's last line, or which limit; cleaned, at most 500 characters."""
    seconds: float
    """Wall time, both starts included."""


def _room_for() -> int:
    """Programs that can be started at the same time with the descriptors that this process has left."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        there = len(os.listdir("/proc/self/fd"))
    except OSError:  # none is left to look with, or there is no /proc
        there = 0
    return (most - there - _SPARE_DESCRIPTORS) // _DESCRIPTORS


class _EndedError(Exception):
    """The program was ended because nobody wants its outcome any more."""


def _nothing() -> None:
    pass


class Sandbox(AbstractContextManager["Sandbox"]):
    """Runs programs, several at a time; after `close` no process and no file of theirs is left.

    Args:
        limits: of each process of a program.
        workers: programs at a time at most; None takes one a processor. Fewer where the limit of open files wants it.

    Raises:
        SandboxError: this machine cannot contain a program: nothing is run.
    """

    def __init__(self, limits: Limits, workers: int | None = None) -> None:
        found = containment()
        if not found.sufficient:
            raise SandboxError(
                f"generated code cannot be contained on this machine, so none is run: {found.reason}",
                expected="a program that can neither signal others, nor write outside its directory, nor outlive us",
                do=found.do,
            )
        self._open(limits, workers, found.walls)

    @classmethod
    def _behind(cls, walls: Sequence[str], limits: Limits, workers: int | None = None) -> Sandbox:
        """With these walls and no others: for tests, which show what each of them holds by itself."""
        made = cls.__new__(cls)
        made._open(limits, workers, walls)
        return made

    def _open(self, limits: Limits, workers: int | None, walls: Sequence[str]) -> None:
        self._limits, self._walls = limits, tuple(walls)
        wanted = workers if workers is not None else len(os.sched_getaffinity(0))
        self._workers = max(1, min(wanted, _room_for()))
        self._scratch = Scratch()
        self._closing, self._close_now = os.pipe()
        self._running = 0
        self._idle = threading.Condition()
        self._closed = False

    @property
    def workers(self) -> int:
        """Programs at a time, at most."""
        return self._workers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what runs, waits until it is gone, and removes the scratch directory."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            os.close(self._close_now)
            self._idle.wait_for(lambda: self._running == 0)
        os.close(self._closing)
        self._scratch.remove()

    def run(self, program: Program) -> Outcome:
        """Runs one program to its end.

        Raises:
            SandboxError: a wall did not stand, so it was not run; or the sandbox was closed meanwhile.
        """
        try:
            return self._run(program, self._closing)
        except _EndedError:
            raise SandboxError("the sandbox is closed") from None

    def run_all(
        self, programs: Iterable[tuple[Key, Program]], poll: Callable[[], object] = _nothing
    ) -> Iterator[tuple[Key, Outcome]]:
        """Runs all of them, yielding each as it ends.

        Args:
            programs: with a key each; taken as they are wanted.
            poll: called at least every 0.2 s while one waits; what it raises ends all of them.

        Raises:
            SandboxError: see `run`.
        """
        waiting = iter(programs)
        running: dict[Future[Outcome], Key] = {}
        ended, end_now = os.pipe()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="sandbox")
        try:
            while True:
                while len(running) < self._workers and (item := next(waiting, None)) is not None:
                    running[pool.submit(self._run, item[1], ended)] = item[0]
                if not running:
                    return
                done, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                poll()
                for future in done:
                    try:
                        outcome = future.result()
                    except _EndedError:
                        raise SandboxError("the sandbox is closed") from None
                    yield running.pop(future), outcome
        finally:
            os.close(end_now)
            pool.shutdown(wait=True, cancel_futures=True)
            os.close(ended)

    def _run(self, program: Program, ended: int) -> Outcome:
        with self._idle:
            if self._closed:
                raise _EndedError
            self._running += 1
        try:
            return self._judged(program, ended)
        except OSError as problem:
            raise SandboxError(
                f"a program cannot be started: {problem.strerror}",
                expected=f"{_DESCRIPTORS} descriptors for each of {self._workers} workers",
                do="set a higher limit (ulimit -n), or evaluate.workers to fewer",
            ) from None
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _judged(self, program: Program, ended: int) -> Outcome:
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            ask, asked, reply, replied, verdict, given = (
                stack.enter_context(FileIO(end, mode))
                for _ in range(3)
                for end, mode in zip(os.pipe(), ("r", "w"), strict=True)
            )
            source = {"source": program.prompt + program.completion, "entry_point": program.entry_point}
            test = {"prompt": program.prompt, "test": program.test, "entry_point": program.entry_point}
            kept: list[Contained] = []
            try:
                kept.append(self._contained("answer", (ask, replied), source))
                kept.append(self._contained("checker", (reply, asked, given), test))
                for file in (ask, asked, reply, replied, given):
                    file.close()  # or the end of a process is not seen
                for each in kept:
                    each.begin()
                said = self._await(verdict.fileno(), started + self._limits.wall_seconds, ended)
                if said is not None and _verdict(said)[0] in ("", "gone"):
                    kept[0].wait(_DYING_SECONDS)  # so that it is seen how it went, and not how it was ended
            finally:
                ends = _end_all(kept)  # the answer's, the checker's
        outcome, detail = _outcome(said, ends[0], ends[1], self._limits)
        seconds = time.monotonic() - started
        return Outcome(outcome == "passed", outcome, clean(detail, _DETAIL), seconds)

    def _contained(self, role: str, files: Sequence[FileIO], text: dict[str, str]) -> Contained:
        descriptors = [file.fileno() for file in files]
        return Contained(role, self._walls, self._limits, self._scratch, descriptors, text)

    def _await(self, verdict: int, deadline: float, ended: int) -> bytes | None:
        """All that comes over the verdict's pipe until it is closed; None at the deadline."""
        poll = select.poll()
        for descriptor in (verdict, ended, self._closing):
            poll.register(descriptor, select.POLLIN)
        said = b""
        while (left := deadline - time.monotonic()) > 0:
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            if ended in ready or self._closing in ready:
                raise _EndedError
            if verdict in ready:
                piece = os.read(verdict, _MAX_VERDICT)
                said += piece
                if not piece or len(said) > _MAX_VERDICT:
                    return said
        return None


def _end_all(kept: Sequence[Contained]) -> list[Ended]:
    """Ends every one, and raises what was wrong with one of them only when all are gone."""
    ends: list[Ended] = []
    trouble: SandboxError | None = None
    for each in kept:
        try:
            ends.append(each.end())
        except SandboxError as error:
            trouble = trouble or error
    if trouble is not None:
        raise trouble
    return ends


def _outcome(said: bytes | None, answer: Ended, checker: Ended, limits: Limits) -> tuple[str, str]:
    """What a program's verdict and the ends of its two processes come to."""
    if said is None:
        return "time", f"more than {limits.wall_seconds:g} s"
    outcome, detail = _verdict(said)
    if outcome == "gone":
        return _gone(answer, limits)
    if outcome:
        return outcome, detail
    outcome, detail = _gone(checker, limits)
    return outcome, f"the test: {detail}"


def _verdict(said: bytes) -> tuple[str, str]:
    """What the checker said; nothing where it said nothing whole."""
    try:
        verdict = json.loads(said[4:])  # behind its length
        outcome, detail = verdict["outcome"], verdict["detail"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return "", ""
    return (outcome, detail) if outcome in _OUTCOMES and isinstance(detail, str) else ("", "")


def _gone(ended: Ended, limits: Limits) -> tuple[str, str]:
    """How a process went that should have stayed."""
    # On a loaded machine the kernel's clock of this limit goes faster than what it accounts in the end.
    if ended.signal in (signal.SIGKILL, signal.SIGXCPU) and ended.cpu_seconds >= 0.5 * limits.cpu_seconds:
        return "time", f"more than {limits.cpu_seconds} s of processor time"
    if ended.signal == signal.SIGKILL:
        return "gone", "it closed its pipe" if ended.told else "it was killed; the machine may be out of memory"
    if ended.signal:
        with contextlib.suppress(ValueError):
            return "gone", f"it ended by {signal.Signals(ended.signal).name}"
        return "gone", f"it ended by signal {ended.signal}"
    return "gone", f"it ended by itself, with status {ended.status}"
