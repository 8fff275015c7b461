"""A run on a host behind SSH that is watched, and what is done to it: launched again, brought to its end, looked at."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from consoles import Eye, Seat
from far_host import SECONDS, FarHost, FarRun

from dispatch.ssh import SSHTransport

_T = TypeVar("_T")


@dataclass
class Scene:
    """A run that is watched, and chance."""

    host: FarHost
    run: FarRun
    chance: random.Random
    control: SSHTransport
    """Of who launches, stops and fetches."""
    eye: Eye
    seats: list[Seat] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    took: float | None = None
    """Seconds to the next event, where a fault has measured that itself."""
    afterwards: list[Callable[[], object]] = field(default_factory=list)
    """What is undone once the run was seen again, or seen to have ended."""

    def clean_up(self) -> None:
        for undo in self.afterwards:
            undo()
        self.afterwards.clear()

    def wait(self, least: float, most: float) -> Awaitable[None]:
        return asyncio.sleep(self.chance.uniform(least, most))

    async def relaunch(self) -> None:
        """Another attempt, and new eyes on it; returns when they have seen something of it."""
        before = time.time()
        await self.run.launch(self.control)
        await self.eye.close()
        self.eye = Eye(self.run, self.chance.random() < 0.5)
        await self.eye.next_event(before)

    async def while_connections_die(self, work: Awaitable[_T]) -> _T:
        """Does something while connections are reset now and then."""
        task = asyncio.ensure_future(work)
        await self.wait(0.0, 0.15)
        for _ in range(self.chance.randint(1, 3)):
            kill_connections(self)
            await asyncio.wait((task,), timeout=self.chance.uniform(0.05, 0.3))
        return await task


def kill_connections(scene: Scene) -> None:
    if scene.host.proxy is not None:
        scene.host.proxy.kill()
    else:
        kill(*scene.host.rig.sessions())


def kill(*pids: int | None, number: int = signal.SIGKILL) -> None:
    for pid in pids:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


async def end_attempt(scene: Scene, how: str) -> None:
    """Brings an attempt to its end by an order, and looks at everything."""
    scene.run.order(how)
    await settle(scene)


async def settle(scene: Scene, seconds: float = SECONDS) -> None:
    """The attempt is ended: every console must say how, and nothing may be left of it."""
    await scene.eye.end(seconds)
    scene.clean_up()
    scene.problems += scene.eye.problems
    scene.eye.problems = []
    await leave(scene)
    scene.problems += scene.run.problems()


async def leave(scene: Scene) -> None:
    """Every real console comes to its end."""
    for seat in scene.seats:
        scene.problems += await seat.problems()
    scene.seats.clear()
