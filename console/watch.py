"""Following a run: lines from its directory, folded into a state, with what is known of the way there."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from console.run_state import Reducer, RunState
from console.view import Link
from dispatch.follower import Batch, Follower
from dispatch.manifest import CONTRACT, EVENTS
from dispatch.runs import RunDir
from dispatch.transport import Transport
from engine.errors import RunError
from engine.falsifiers import Contract, parse_contract


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
        transport: reaches the host that the run's directory is on.

    Raises:
        RunError, ConfigError: the contract that the run is judged by cannot be read.
    """

    def __init__(self, run_dir: RunDir, transport: Transport) -> None:
        self._reducer = Reducer(contract_of(run_dir))
        self._follower = Follower(transport, run_dir.path, run_dir.run)
        self._transport, self._path = transport, f"{run_dir.path}/{EVENTS}"
        self._past: int | None = None
        self._link = Link(host=transport.host)

    async def sights(self) -> AsyncIterator[Sight]:
        """Yields what arrives until the run has ended, and once a second while nothing does.

        After an error it can be called again, and goes on where it was.

        Raises:
            StreamError: the stream is broken for good.
            TransportError: the host cannot be reached now.
        """
        if self._past is None:
            there = await self._transport.stat(self._path)
            self._past = there.size if there else 0
        async for batch in self._follower.batches():
            state = self._reducer.feed(batch.events)
            ended = batch.status in ("ended", "lost")
            self._link = replace(
                self._link,
                status=batch.status,
                heard=time.time() if batch.lines else self._link.heard,
                exit=batch.ended,
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
