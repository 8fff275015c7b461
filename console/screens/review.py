"""Past evidence on the dashboard: read and replayed, never followed, and nothing of it is touched."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.message import Message
from textual.worker import get_current_worker

from console.actions import bindings
from console.outlook import CHANGED_NOTE
from console.run_index import find_smoke
from console.run_reader import LoadedRun, RunReader
from console.run_state import RunState
from console.screens.dashboard import Dashboard
from console.view import Link
from console.widgets.key_bar import KeyBar
from dispatch.evidence import Kind
from dispatch.manifest import SUMS
from dispatch.sums import check_sums
from engine.errors import KdError
from engine.text import clean

SHOW_SECONDS = 0.25
"""Between two pictures of a log that is being read."""
BREATH_SECONDS = 0.001
"""Between two pieces of it, so that keys are answered meanwhile."""


@dataclass
class PieceRead(Message):
    """More was read, and there is more; posted by the reading worker."""

    state: RunState
    read: int
    total: int

    def can_replace(self, message: Message) -> bool:
        """What was read later holds all that was read before."""
        return isinstance(message, PieceRead)


@dataclass
class AllRead(Message):
    """Everything was read."""

    loaded: LoadedRun


@dataclass
class Learned(Message):
    """Something of it from beside its stream."""

    notes: tuple[str, ...] = ()
    smoke_seconds: tuple[float, float, float] | None = None


class _Left(Exception):
    """The screen was left while something was read for it."""


def _leave(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise _Left


class ReviewScreen(Dashboard):
    """Shows one piece of evidence of any kind: what is here, and no more.

    Args:
        path: a directory, or a log.
    """

    BINDINGS = bindings("review")
    where: ClassVar[str] = "review"

    def compose(self) -> ComposeResult:
        """See Textual."""
        yield from self.panes()
        yield KeyBar("review")

    def on_mount(self) -> None:
        """Begins to read."""
        self.latest = replace(self.latest, link=Link(live=False), reading=(0, 0))
        self.read_all()

    @work(thread=True, exclusive=True, group="read", exit_on_error=False)
    def read_all(self) -> None:
        """Reads the evidence piece by piece, then what stands beside it; ends after a piece when it is left."""
        worker = get_current_worker()  # is cancelled with its screen

        def stopped() -> bool:
            return worker.is_cancelled

        reader, shown = RunReader(self.path), time.monotonic()
        while not stopped() and reader.advance():
            if time.monotonic() - shown > SHOW_SECONDS:
                shown = time.monotonic()
                self.post_message(PieceRead(reader.state, reader.offset, reader.total))
            time.sleep(BREATH_SECONDS)
        if stopped():
            return
        loaded = reader.loaded()
        self.post_message(AllRead(loaded))
        self._read_beside(loaded, stopped)

    def _read_beside(self, loaded: LoadedRun, stopped: Callable[[], bool]) -> None:
        """What its checksums say of its small files, and what a smoke of the same configuration promised."""
        if (self.path / SUMS).is_file() and not stopped():
            try:
                problems = check_sums(self.path, weights=False, progress=lambda name, count: _leave(stopped)).problems
            except _Left:
                return
            except KdError as error:
                problems = (clean(str(error), 300),)
            self.post_message(Learned(notes=tuple(f"{CHANGED_NOTE}{each}" for each in problems)))
        manifest = loaded.manifest
        if manifest is not None and manifest.mode == "train" and not stopped():
            steps = loaded.state.target_steps or 0
            found = find_smoke(self.app.evidence, manifest.gate_fingerprint, manifest.where, steps)
            self.post_message(Learned(smoke_seconds=found))

    @on(PieceRead)
    def absorb_piece(self, message: PieceRead) -> None:
        """Shows what was read so far."""
        if self.latest.review is None:
            self.latest = replace(self.latest, state=message.state, reading=(message.read, message.total))
            self.known()

    @on(AllRead)
    def absorb_all(self, message: AllRead) -> None:
        """Shows all of it."""
        loaded = message.loaded
        link = Link(
            host=loaded.about.host, status=loaded.host_state, problem=loaded.problem, exit=loaded.exit, live=False
        )
        self.latest = replace(
            self.latest, state=loaded.state, link=link, manifest=loaded.manifest, review=loaded, reading=None
        )
        self.set_class(loaded.kind is not Kind.RUN, "log")
        self.known()
        self.loaded.set()

    @on(Learned)
    def learn(self, message: Learned) -> None:
        """Takes over what was found beside the stream."""
        smoke = message.smoke_seconds or self.latest.smoke_seconds
        self.latest = replace(self.latest, smoke_seconds=smoke, notes=(*self.latest.notes, *message.notes))
        self.known()
