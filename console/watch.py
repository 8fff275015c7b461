"""Following a run: lines from its directory, folded into a state, with what is known of the way there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from console.run_state import Reducer, RunState
from console.view import Link
from dispatch.follower import Batch
from dispatch.manifest import CONTRACT, EVENTS
from dispatch.places import Place
from dispatch.runs import RunDir
from dispatch.transport import HostRefusal, TransportError
from engine.errors import RunError
from engine.falsifiers import Contract, parse_contract
from engine.text import clean

RETRY_SECONDS = (0.1, 15.0)
"""After the first failure, and at most, until the host is asked again; each time twice as long, give or take a half."""


@dataclass(frozen=True)
class Sight:
    """A run as it stands after a batch of its stream."""

    state: RunState
    link: Link
    batch: Batch
    caught_up: bool
    """All was read that stood there when the following began; what comes from now on is news."""


class Watcher:
    """Follows one run, live or past; both are the same.

    Args:
        run_dir: the run.
        place: where it is.

    Raises:
        RunError, ConfigError: the contract that the run is judged by cannot be read.
    """

    def __init__(self, run_dir: RunDir, place: Place) -> None:
        self._reducer = Reducer(contract_of(run_dir))
        self._follower = place.follower(run_dir.run)
        self._place = place
        self._past: int | None = None
        self._link = Link(host=place.transport.host)

    async def sights(self) -> AsyncIterator[Sight]:
        """Yields what arrives until the run has ended, and once a second while nothing does.

        While the host cannot be reached the link says why, and it is tried again for as long as one asks; then it goes
        on where it was, with nothing lost and nothing twice.

        Raises:
            StreamError: the stream is broken for good.
            HostRefusal: the host, or its key, lets us in no more.
        """
        wait, longest = RETRY_SECONDS
        while True:
            try:
                async for sight in self._sights_while_reached():
                    wait = RETRY_SECONDS[0]
                    yield sight
                return
            except HostRefusal:
                raise
            except TransportError as error:
                self._link = replace(self._link, problem=clean(str(error), 500))
            unknown = self._follower.clocks.at_once(reached=False)
            self._link = replace(self._link, liveness=unknown)
            nothing = Batch((), (), self._follower.offset, self._link.status, None, 0.0, unknown)
            yield Sight(self._reducer.state, self._link, nothing, caught_up=self._past is not None)
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))
            wait = min(longest, 2 * wait)

    async def _sights_while_reached(self) -> AsyncIterator[Sight]:
        if self._past is None:
            there = await self._place.transport.stat(f"{self._place.run_dir}/{EVENTS}")
            self._past = there.size if there else 0
        async for batch in self._follower.batches():
            state = self._reducer.feed(batch.events)
            ended = batch.status in ("ended", "lost")
            self._link = replace(
                self._link,
                status=batch.status,
                heard=time.time() if batch.lines else self._link.heard,
                answered=time.time(),
                liveness=batch.liveness,
                latency_seconds=None if self._place.local else self._follower.latency_seconds,
                problem="",
                exit=batch.ended,
                rebooted=batch.rebooted,
                live=not ended,
            )
            caught_up = not batch.lines or batch.offset >= self._past
            yield Sight(state, self._link, batch, caught_up)


def contract_of(run_dir: RunDir) -> Contract:
    """The contract that a run is judged by, from its directory.

    Raises:
        RunError: it cannot be read.
        ConfigError: it is no contract.
    """
    path = run_dir.path / CONTRACT
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RunError(f"{path}: {reason}", expected="the contract that the run was started with") from None
    return parse_contract(text, CONTRACT)
