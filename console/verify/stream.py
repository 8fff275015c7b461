"""A stream replayed from its first byte: is every line an event of this run, in its place, and what comes of them."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from console.verify.claims import Claim, differs, same, untold
from console.verify.fold import MAX_FAULTS, Faults, Fold
from dispatch.manifest import EVENTS, Manifest
from dispatch.sums import Progress
from engine.errors import StreamError
from engine.falsifiers import FIRST_PHASE, Contract
from engine.stream import MAX_LINE_BYTES, Event, Phase, Verdict, decode_line
from engine.text import clean

PART = "stream"
STEADY_VERSION = 2
"""Of manifests: from it on the times of an attempt come from a clock that nobody can set back."""
_PROGRESS_LINES = 4096
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?|\b(?:nan|inf)\b", re.IGNORECASE)
_KINDS = {
    "lines": ("every line is an event", "format version 1"),
    "seq": ("seq counts without a gap", "0, 1, 2, …"),
    "run": ("every event is of this run", "one run"),
    "time": ("time never goes back within an attempt", "forward"),
    "attempts": ("attempts follow each other", "1, 2, 3, …"),
    "steps": ("steps count without a gap", "1, 2, 3, …"),
    "speed": ("speeds are those of the steps", "tokens/s, MFU, split"),
    "answers": ("answers come after controls, each once", "passed or not, as its outcome says"),
    "verdicts": ("verdicts fall where they are stated", "as they are judged"),
}


class _Head(msgspec.Struct):
    """What every event carries, those of later writers included."""

    event: str = ""
    run: str = ""
    seq: int = -1
    t: float = math.nan


_heads = msgspec.json.Decoder(_Head)


@dataclass(frozen=True)
class Replay:
    """A stream, followed to its end."""

    fold: Fold
    faults: Faults
    events: int
    unknown: int
    """Events of types that a later writer knows."""
    torn: int
    """Bytes of a last line that was never finished."""
    run: str | None
    """uuid of its events."""
    first_seq: int
    last_seq: int


class _Reader:
    """Holds each line against the one before it."""

    def __init__(self, contract: Contract | None, run: str | None, steady: bool) -> None:
        self.faults = Faults()
        self.fold = Fold(contract, self.faults)
        self.run, self._steady = run, steady
        self.events = self.unknown = 0
        self.first, self.seq = -1, -1
        self._t = -math.inf

    def line(self, raw: bytes, number: int) -> None:
        """Takes one whole line, without its newline."""
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise StreamError(f"a line of {len(raw):,} bytes or more", expected=f"at most {MAX_LINE_BYTES:,}")
            event: Event | _Head | None = decode_line(raw)
            if event is None:
                self.unknown += 1
                event = _heads.decode(raw)
        except (StreamError, *_NOT_JSON) as error:
            self.faults.add("lines", f"line {number}: {clean(str(error), 200)}")
            self._skip(raw)
            return
        self.events += 1
        self._seq_follows(event, number)
        if event.run != (self.run or event.run):
            self.faults.add("run", f"line {number}, seq {event.seq}: of run {event.run}, expected {self.run}")
        self.run = self.run or event.run
        self._time_follows(event, number)
        if isinstance(event, Event):
            try:
                self.fold.see(event, number)
            except ArithmeticError as error:
                self.faults.add("lines", f"line {number}: numbers that nothing can be computed from: {error}")

    def _skip(self, raw: bytes) -> None:
        """A line that cannot be read still has its place: what follows it is not to be called a gap."""
        try:
            self.seq = max(self.seq + 1, _heads.decode(raw).seq)
        except _NOT_JSON:
            self.seq += 1

    def _seq_follows(self, event: Event | _Head, number: int) -> None:
        if self.first < 0:
            self.first = event.seq
        if event.seq != self.seq + 1:
            self.faults.add("seq", f"line {number}: {_gap(self.seq, event.seq)}")
        self.seq = event.seq

    def _time_follows(self, event: Event | _Head, number: int) -> None:
        opens = isinstance(event, Phase) and event.name == FIRST_PHASE
        if not math.isfinite(event.t):
            self.faults.add("time", f"line {number}, seq {event.seq}: t is {event.t}, expected a time")
            return
        if event.t < self._t and self._steady and not opens:
            self.faults.add(
                "time", f"line {number}, seq {event.seq}: {self._t - event.t:.3f} s before the line above it"
            )
        self._t = event.t


def _gap(before: int, now: int) -> str:
    if before < 0:
        return f"seq {now} comes first, expected seq 0: what stood before it is missing"
    if now <= before:
        return f"seq {now} after seq {before}: an event was inserted, doubled or moved"
    missing = now - before - 1
    return f"seq {now} after seq {before}: {'an event is' if missing == 1 else f'{missing:,} events are'} missing"


def replay(directory: Path, contract: Contract | None, manifest: Manifest | None, progress: Progress) -> Replay | None:
    """Follows the stream of a run that is over; None where there is none.

    Raises:
        StreamError: what stands there is no file that can be read.
    """
    steady = manifest is None or manifest.v >= STEADY_VERSION
    reader = _Reader(contract, manifest.run if manifest else None, steady)
    torn = number = told = 0
    try:
        descriptor = os.open(directory / EVENTS, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StreamError(f"{EVENTS}: no regular file")
            for number, line in enumerate(_lines(file), 1):
                told += len(line)
                if number % _PROGRESS_LINES == 0:
                    progress(EVENTS, told)
                    told = 0
                if line.endswith(b"\n"):
                    reader.line(line[:-1], number)
                else:
                    torn = len(line)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StreamError(f"{EVENTS}: {error.strerror}") from None
    return Replay(
        reader.fold, reader.faults, reader.events, reader.unknown, torn, reader.run, max(reader.first, 0), reader.seq
    )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their newlines; of one that is too long its first bytes, as one line."""
    while line := file.readline(MAX_LINE_BYTES + 2):
        if len(line) == MAX_LINE_BYTES + 2 and not line.endswith(b"\n"):
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            line += b"\n" if rest else b""
        yield line


def stream_claims(played: Replay, starts: int) -> Iterator[Claim]:
    """What the stream says of itself.

    Args:
        played: the whole stream.
        starts: of the trainer, as its supervisor noted them.
    """
    faults, fold = played.faults, played.fold
    recomputed = {
        "lines": f"{played.events:,} events" + (f", {played.unknown:,} of unknown types" if played.unknown else ""),
        "seq": f"{played.first_seq} to {played.last_seq:,}" if played.events else "no event",
        "run": played.run or "no event",
        "time": "forward",
        "attempts": f"{len(fold.attempts)}",
        "steps": _steps(fold),
        "speed": f"{fold.speeds:,} told",
        "answers": f"{len(fold.answers.answers):,} answers",
        "verdicts": f"{len(fold.stated)} stated",
    }
    for kind, (name, stated) in _KINDS.items():
        if (kind == "verdicts" and not fold.judged) or (kind == "speed" and not fold.speeds):
            continue
        if kind == "answers" and not fold.answers.answers and kind not in faults.counts:
            continue
        if kind not in faults.counts:
            yield same(PART, name, stated, recomputed[kind])
            continue
        for text in faults.named[kind]:
            yield differs(PART, name, stated, "not so", f"{EVENTS}: {text}")
        if faults.counts[kind] > MAX_FAULTS:
            yield differs(PART, name, stated, "not so", f"and {faults.counts[kind] - MAX_FAULTS:,} more")
    if played.torn:
        if fold.end is not None and starts <= len(fold.attempts):  # else a later attempt was killed as it began
            why = f"{EVENTS}: {played.torn:,} bytes after the end event, without a line's end"
            yield differs(PART, "nothing follows the end", "nothing", f"{played.torn:,} bytes", why)
        else:
            yield same(PART, "the last line", "torn by the end of its process", f"{played.torn:,} bytes, left out")


def _steps(fold: Fold) -> str:
    made = sum(len(attempt.steps) for attempt in fold.attempts)
    again = made - len(fold.losses)
    return f"{len(fold.losses):,} steps" + (f", {again:,} made again or lost" if again else "")


def verdict_claims(fold: Fold, contract_problem: str, same_engine: bool) -> Iterator[Claim]:
    """Every falsifier, as the engine stated it and as the stream makes it.

    Args:
        fold: of the whole stream.
        contract_problem: why there is no contract to judge by.
        same_engine: the run's engine is the one that judges here, so that even its words must be the same.
    """
    if contract_problem:
        yield untold("verdicts", "every falsifier judged anew", "", contract_problem, essential=True)
        return
    unsaid = fold.unsaid if fold.end is None else {}
    judged = [verdict.id for verdict in fold.judged]
    for identifier in [*judged, *(each for each in fold.stated if each not in judged)]:
        theirs, ours = fold.stated.get(identifier), fold.fallen.get(identifier)
        stated = "not stated" if theirs is None else f"{theirs.verdict}: {theirs.observed}"
        found = "PENDING" if ours is None else f"{ours.verdict}: {ours.observed}"
        if identifier not in judged:
            yield differs("verdicts", identifier, stated, "not in the contract, or not for such a run")
        elif identifier in unsaid:
            yield untold("verdicts", identifier, stated, f"{found}, and the process ended before it said so")
        elif theirs is None or ours is None:
            made = same if theirs is ours else differs
            yield made("verdicts", identifier, stated, found)
        else:
            yield _held(identifier, theirs, ours, same_engine)


def _held(identifier: str, theirs: Verdict, ours: Verdict, same_engine: bool) -> Claim:
    """One falsifier's verdict as it is stated, and as it fell when judged anew."""
    stated, found = f"{theirs.verdict}: {theirs.observed}", f"{ours.verdict}: {ours.observed}"
    contradiction, reworded = _contradiction(theirs, ours), _rewording(theirs, ours)
    if contradiction or (reworded and same_engine):
        return differs("verdicts", identifier, stated, found, contradiction or reworded)
    if reworded and _numbers(theirs) != _numbers(ours):
        return untold("verdicts", identifier, stated, f"another version of the engine ran it: {reworded}")
    return same("verdicts", identifier, stated, found)


def _contradiction(theirs: Verdict, ours: Verdict) -> str:
    """What no version of the engine may judge otherwise."""
    return _different(theirs, ours, ("verdict", "severity", "step"))


def _rewording(theirs: Verdict, ours: Verdict) -> str:
    """What one version of the engine may say otherwise than another, where both come to the same verdict."""
    return _different(theirs, ours, ("claim", "expected", "observed"))


def _numbers(verdict: Verdict) -> list[str]:
    return _NUMBER.findall(f"{verdict.expected} {verdict.observed}")


def _different(theirs: Verdict, ours: Verdict, names: tuple[str, ...]) -> str:
    told = []
    for name in names:
        one, other = clean(str(getattr(theirs, name))), clean(str(getattr(ours, name)))
        if one != other:
            told.append(f"{name} is stated as {one}, judged anew it is {other}")
    return "; ".join(told)
