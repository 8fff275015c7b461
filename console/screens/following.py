"""A screen that follows one run: it owns what is known of it, and says when something happened."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from textual import on, work
from textual.message import Message
from textual.worker import Worker, WorkerError

from console.run_index import find_smoke
from console.screens.dashboard import Dashboard
from console.view import View
from console.watch import Sight, Watcher
from dispatch import runs
from dispatch.manifest import SUMS
from dispatch.mirror import LostTail
from dispatch.places import Place, collect
from engine.errors import KdError
from engine.text import clean


@dataclass
class SightArrived(Message):
    """More of the run is known; posted by the following worker."""

    sight: Sight

    def can_replace(self, message: Message) -> bool:
        """A later sight holds everything that an earlier one does."""
        return isinstance(message, SightArrived)


@dataclass
class Trouble(Message):
    """The run cannot be followed any more."""

    problem: str


@dataclass
class Learned(Message):
    """Something about the run from beside its stream."""

    smoke_seconds: tuple[float, float, float] | None = None
    notes: tuple[str, ...] = ()


class FollowingScreen(Dashboard):
    """Follows one run and draws what is known of it.

    Args:
        run_dir: the run.
    """

    def __init__(self, run_dir: runs.RunDir) -> None:
        super().__init__(run_dir.path)
        self.run_dir = run_dir
        self.view = self.latest = View(manifest=run_dir.manifest)
        self.place: Place | None = None
        """Where it is; known once the following has begun."""
        self._told: frozenset[str] | None = None
        self._sealing: Worker[None] | None = None

    @property
    def named_run(self) -> str:
        """See `Dashboard`."""
        return self.run_dir.id

    @property
    def going_on(self) -> bool:
        """The run has not ended, as far as is known."""
        return self.latest.link.live and self.latest.state.end is None

    @property
    def goes_on(self) -> str:
        """See `GuardedScreen`."""
        return self.run_dir.id if self.going_on else ""

    @work(exclusive=True, group="stream", exit_on_error=False)
    async def follow_run(self, accept_loss: bool = False) -> None:
        """Follows the run to its end, through every loss of the way to it.

        Args:
            accept_loss: go on where the host was started anew and lost the end of the stream; it is kept here.
        """
        try:
            await self._follow(self.app.say if accept_loss else None)
        except LostTail as error:
            self.post_message(Trouble(str(error)))
            if not self.app.readonly and await self.accepts(error):
                self.follow_run(accept_loss=True)
        except KdError as error:
            self.post_message(Trouble(str(error)))

    async def _follow(self, loss: Callable[[str], object] | None) -> None:
        self.place = self.app.reach.place(self.run_dir, keep=True, loss=loss)
        try:
            watcher = await asyncio.to_thread(Watcher, self.run_dir, self.place)
            async for sight in watcher.sights():
                if sight.link.status == "ended":
                    await collect(self.place, self.run_dir)
                self.post_message(SightArrived(sight))
                await asyncio.sleep(0)
        finally:
            self.place.close()

    async def accepts(self, error: LostTail) -> bool:
        """Asks whether to go on without what the host lost; to be awaited from a worker."""
        question = f"{self.run_dir.manifest.where} lost the end of this run. Go on without it?"
        return await self.app.ask(question, f"{error}\n\nWhat is here is kept aside and no longer shown.", "go on")

    @on(SightArrived)
    def absorb(self, message: SightArrived) -> None:
        """Takes the newest state over."""
        sight, before = message.sight, self.latest
        self.latest = replace(before, state=sight.state, link=sight.link)
        if before.state.run is None and sight.state.run is not None:
            self.look_up_smoke(sight.state.target_steps or 0)
        if before.link.live and not sight.link.live:
            self._sealing = self.close_run()
        if sight.caught_up:
            self._tell()
        self.known()
        if sight.caught_up:
            self.loaded.set()

    @on(Trouble)
    def lose(self, message: Trouble) -> None:
        """Says that nothing can be read now; what was read stays."""
        link = replace(self.latest.link, problem=clean(message.problem, 500), live=False)
        self.latest = replace(self.latest, link=link)
        self.known()
        self.loaded.set()

    @on(Learned)
    def learn(self, message: Learned) -> None:
        """Takes over what was found beside the stream."""
        smoke = message.smoke_seconds or self.latest.smoke_seconds
        self.latest = replace(self.latest, smoke_seconds=smoke, notes=(*self.latest.notes, *message.notes))
        self.known()

    @work(thread=True, group="smoke", exit_on_error=False)
    def look_up_smoke(self, steps: int) -> None:
        """Finds what a smoke of the same configuration promised."""
        manifest = self.run_dir.manifest
        if manifest.mode != "train":
            return
        found = find_smoke(self.app.evidence, manifest.gate_fingerprint, manifest.where, steps)
        if found is not None:
            self.post_message(Learned(smoke_seconds=found))

    async def on_unmount(self) -> None:
        """Breaks off what is being asked of the run's host, in order: no process of it is left behind."""
        if self._sealing is not None:
            self._sealing.cancel()
            with contextlib.suppress(WorkerError):
                await self._sealing.wait()

    @work(exclusive=True, group="close", exit_on_error=False)
    async def close_run(self) -> None:
        """Completes the evidence of a run that has ended; that of an old one is held against its files."""
        if self.app.readonly and not (self.run_dir.path / SUMS).exists():
            return
        from dispatch.seal import seal

        try:
            place = self.app.reach.place(self.run_dir, keep=True)
            try:
                sealed = await seal(self.run_dir, place, self.app.say)
            finally:
                place.close()
        except KdError as error:
            self.post_message(Learned(notes=(f"the evidence is not complete: {error}",)))
            return
        since = "not listed" if sealed.new else "since the run ended"
        if sealed.problems:
            self.post_message(Learned(notes=tuple(f"{since}: {each}" for each in sealed.problems)))

    def _tell(self) -> None:
        """Rings and notifies when a verdict fails or the run ends; not for what was so when it was opened."""
        state = self.latest.state
        failed = frozenset(v.id for v in state.judged if v.verdict == "FAIL")
        ended = frozenset(("end",)) if state.end is not None or not self.latest.link.live else frozenset()
        before, self._told = self._told, failed | ended
        if before is None:
            return
        for identifier in sorted(failed - before):
            self.app.alert(f"{self.run_dir.id}: ✘ FAIL {identifier}", "error")
        if ended - before:
            how = f"{state.end.status}: {state.end.reason}" if state.end else "it ended without a word"
            self.app.alert(
                f"{self.run_dir.id}: {how}", "information" if state.end and state.end.exit_code == 0 else "error"
            )
