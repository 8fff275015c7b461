"""A log of text lines folded like a stream: the predecessor's, or one of ours whose stream is lost."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from console.run_state import Reducer, RunState, Source
from dispatch.evidence import Evidence
from dispatch.legacy import LegacyLog
from engine.errors import StreamError
from engine.falsifiers import Contract, builtin_contract, parse_contract
from engine.stream import Event
from engine.text import clean

READ_BYTES = 1 << 18
"""One piece of a log: some milliseconds of parsing."""
LOG = Source(columns=frozenset(("step", "loss")), verbatim=True, judged_by_us=True)


class LogFold:
    """Folds the first of the evidence's logs, piece by piece; see `run_reader.Fold`.

    Args:
        evidence: of a kind that has logs, or a manifest alone.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.offset = 0
        self.problem = ""
        self._path = evidence.logs[0] if evidence.logs else None
        self._log = LegacyLog(evidence.old)
        self._reducer = Reducer(_contract(), LOG)
        self._over = self._path is None

    @property
    def state(self) -> RunState:
        """The run so far."""
        state = self._reducer.state
        if self._log.unit == state.source.unit:
            return state
        return replace(state, source=replace(state.source, unit=self._log.unit))

    def advance(self) -> bool:
        """Folds the next piece; False when the log's end was reached."""
        if self._over:
            return False
        try:
            data = self._read()
        except StreamError as error:
            self.problem, self._over = str(error), True
            return False
        self.offset += len(data)
        self._over = not data
        self._feed(self._log.feed(data) if data else self._log.finish())
        return not self._over

    def _feed(self, events: Sequence[Event]) -> None:
        try:
            self._reducer.feed(events)
        except ArithmeticError as error:
            self.problem, self._over = f"numbers that nothing can be computed from: {error}", True

    def _read(self) -> bytes:
        assert self._path is not None
        name = clean(self._path.name, 200)
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise StreamError(f"{name}: no regular file")
                return os.pread(descriptor, READ_BYTES, self.offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StreamError(f"{name}: {error.strerror}") from None


@cache
def _contract() -> Contract:
    return parse_contract(builtin_contract("predecessor"), "predecessor.yaml")
