"""An evaluation's two growing files: answers as they were generated, and what came of them. Needs no torch.

Each row is one line of JSON. Rows are appended many at once, on the disk before anybody goes on; a line that a process
left half is cut off, and everything else that does not fit the evaluation is refused by name.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final, Generic, Literal, TypeVar

import msgspec

from engine.errors import ExitCode, KdError
from engine.problems import Problem
from engine.text import clean

MAX_LINE_BYTES: Final = 8 << 20
MAX_BYTES: Final = 4 << 30
"""Of a file."""

Key = tuple[str, int]
"""Task and sample: one answer."""
Count = Annotated[int, msgspec.Meta(ge=0)]


class AnswersError(KdError):
    """A file of answers or results is damaged, of another evaluation, or the disk does not take more of it."""

    exit_code = ExitCode.UNDECIDED


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of `completions.jsonl`: one answer as it was generated."""

    task: str
    sample: Count
    """Of this task, from 0."""
    completion: str
    """What followed the prompt, cut before the text that stopped it. Untrusted, and as it came."""
    tokens: Count
    """Generated ones."""
    finish: Literal["stop", "length", "end"]
    """At a stop text, at the limit of tokens, or at an end token."""
    seed: Count
    """Of its batch."""

    @property
    def key(self) -> Key:
        """Which answer it is."""
        return self.task, self.sample


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of `results.jsonl`: what came of the program that an answer makes."""

    task: str
    sample: Count
    passed: bool
    outcome: Literal["passed", "wrong", "error", "time", "memory", "gone"]
    detail: str
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    """Of the program."""

    @property
    def key(self) -> Key:
        """Which answer it is about."""
        return self.task, self.sample


Row = TypeVar("Row", Answer, Result)


class Rows(Generic[Row]):
    """One of the two files, open for more.

    Args:
        path: made with mode 0600 where it is missing.
        kind: of its rows.

    Raises:
        AnswersError: it cannot be opened or read, or a whole line of it is no such row.
    """

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.name = path.name
        self.rows: list[Row] = []
        self._ends: list[int] = []
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise AnswersError(f"{self.name}: cannot be opened: {error.strerror}") from None
        try:
            for number, line in enumerate(self._lines(), 1):
                self.rows.append(_decoded(line, kind, f"{self.name}:{number}"))
                self._ends.append((self._ends[-1] if self._ends else 0) + len(line) + 1)
            self.cut(len(self.rows))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.rows)

    def cut(self, rows: int) -> None:
        """Forgets all rows after the first so many, and half a line at the end."""
        size = self._ends[rows - 1] if rows else 0
        try:
            if os.fstat(self._fd).st_size != size:
                os.ftruncate(self._fd, size)
            os.lseek(self._fd, size, os.SEEK_SET)
        except OSError as error:
            raise AnswersError(f"{self.name}: cannot be cut: {error.strerror}") from None
        del self.rows[rows:], self._ends[rows:]

    def add(self, rows: Sequence[Row]) -> None:
        """Appends rows, down to the disk: all of them, or none.

        Raises:
            AnswersError: the disk does not take them.
        """
        lines = [msgspec.json.encode(row) + b"\n" for row in rows]
        before = self._ends[-1] if self._ends else 0
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, before)
                os.lseek(self._fd, before, os.SEEK_SET)
            raise AnswersError(
                f"{self.name}: cannot be written: {error.strerror}",
                do="free space, and resume: what is there is not made again",
            ) from None
        for row, line in zip(rows, lines, strict=True):
            before += len(line)
            self._ends.append(before)
            self.rows.append(row)

    def close(self) -> None:
        """Everything is on the disk already; closing again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lines(self) -> list[bytes]:
        """The whole lines, without their ends."""
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise AnswersError(
                    f"{self.name}: {status.st_size:,} bytes", expected=f"a file of at most {MAX_BYTES:,}"
                )
            with open(os.dup(self._fd), "rb") as file:
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError as error:
            raise AnswersError(f"{self.name}: cannot be read: {error.strerror}") from None
        return whole.split(b"\n") if whole else []


def plan(problems: Iterable[Problem], samples: int) -> list[Key]:
    """Every answer that an evaluation makes, in the order in which it makes them: all samples of a problem, the next.

    Batches are cut from this order, and so are the same whatever an earlier attempt had done.
    """
    return [(problem.task, sample) for problem in problems for sample in range(samples)]


def check_answers(name: str, answers: Sequence[Answer], planned: Sequence[Key], seeds: Sequence[int]) -> None:
    """Refuses answers that this evaluation did not make.

    Args:
        name: of their file.
        answers: as read.
        planned: see `plan`.
        seeds: of each planned answer's batch.

    Raises:
        AnswersError: the first of them that is another than the plan has there.
    """
    for number, answer in enumerate(answers, 1):
        where = f"{name}:{number}"
        if number > len(planned):
            raise _foreign(f"{where}: {_shown(answer.key)}", f"{len(planned):,} answers, which are all that is asked")
        if answer.key != planned[number - 1]:
            asked = _shown(planned[number - 1])
            raise _foreign(f"{where}: {_shown(answer.key)}", f"{asked}, by problems.jsonl and evaluate.samples")
        if answer.seed != seeds[number - 1]:
            raise _foreign(
                f"{where}: {_shown(answer.key)} has seed {answer.seed}", f"{seeds[number - 1]}, by evaluate.seed"
            )


def check_results(name: str, results: Sequence[Result], answered: Collection[Key]) -> None:
    """Refuses results of what was not answered, or was judged before.

    Args:
        name: of their file.
        results: as read.
        answered: what there are answers to.

    Raises:
        AnswersError: the first such result.
    """
    seen: set[Key] = set()
    for number, result in enumerate(results, 1):
        where = f"{name}:{number}"
        if result.key not in answered:
            raise _foreign(f"{where}: {_shown(result.key)}", "a result of an answer in completions.jsonl")
        if result.key in seen:
            raise _foreign(f"{where}: {_shown(result.key)} for the second time", "each result once")
        if result.passed != (result.outcome == "passed"):
            raise _foreign(f"{where}: passed is {result.passed} and outcome {result.outcome}", "the two to agree")
        seen.add(result.key)


def _foreign(what: str, expected: str) -> AnswersError:
    return AnswersError(
        what, expected=expected, do="evaluate into a new run, or remove both completions.jsonl and results.jsonl"
    )


def _shown(key: Key) -> str:
    return f"task {clean(key[0], 200)} sample {key[1]}"


def _decoded(line: bytes, kind: type[Row], where: str) -> Row:
    if len(line) > MAX_LINE_BYTES:
        raise AnswersError(f"{where}: {len(line):,} bytes", expected=f"at most {MAX_LINE_BYTES:,} a line")
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _foreign(f"{where}: {clean(str(error), 200)}", "a row that an evaluation wrote") from None
