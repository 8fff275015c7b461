"""Consoles that watch a run through faults: one in this process that is exact about what it sees, and real commands."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from typing import Any

from far_host import SECONDS, FarRun, until

from console.conclusion import Conclusion, conclude
from console.watch import Sight, Watcher
from dispatch.transport import HostRefusal
from engine.errors import ExitCode

ENDINGS = {
    "finish": ({"COMPLETED"}, ExitCode.OK),
    "fail": ({"FAILED"}, ExitCode.USAGE),
    "stop": ({"STOPPED"}, ExitCode.INTERRUPTED),
    "kill": ({"CRASHED"}, ExitCode.UNDECIDED),
    "lose": ({"CRASHED", "LOST", "UNKNOWN"}, ExitCode.UNDECIDED),
}
"""What a console must conclude from what was done to a run: status, and exit code."""


class Eye:
    """A console in this process. It counts what is lost or repeated, and notes every sight that cannot be true.

    Args:
        run: what it watches.
        keep: it keeps the copy of the stream, if nobody else does.
    """

    def __init__(self, run: FarRun, keep: bool) -> None:
        self.run, self.keep = run, keep
        self.lost = self.repeated = 0
        self.problems: list[str] = []
        self.refusals = 0
        self.unreached = 0
        """Times that the link was lost."""
        self.concluded: Conclusion | None = None
        self._latest = 0.0
        self._back = 0
        """Losses of the link after which there came an event again."""
        self._transport = run.host.transport()
        self._changed = asyncio.Condition()
        self._begin()
        self._task = asyncio.create_task(self._work())

    def _begin(self) -> None:
        self._next, self._offset, self._digest, self._was_reached = 0, 0, hashlib.sha256(), True

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._transport.close()

    async def next_event(self, since: float, loss: int | None = None, seconds: float = SECONDS) -> float:
        """Waits for an event that was written after a moment; returns how long after it that was seen.

        Args:
            since: the moment, Unix seconds.
            loss: or for any event that comes after the link was lost so often: who is behind gets older ones first.
            seconds: at most.

        Raises:
            AssertionError: there was none, or the watching is over.
        """

        def came() -> bool:
            return self._latest > since or (loss is not None and self._back >= loss)

        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: came() or self._task.done())
        except TimeoutError:
            raise AssertionError(f"no event for {seconds:g} s") from None
        if not came():
            self._task.result()
            raise AssertionError(f"the watching ended: {self.concluded}")
        return time.time() - since

    async def end(self, seconds: float = SECONDS) -> Conclusion:
        """Waits for the end of the run, and checks all that was seen against the host."""
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(self._task)
        except TimeoutError:
            raise AssertionError(f"no end for {seconds:g} s: {self.run.status()['state']}") from None
        assert self.concluded is not None
        stream = self.run.stream
        if self._digest.hexdigest() != hashlib.sha256(stream).hexdigest():
            self.problems.append(f"saw other bytes than the host has: {self._offset:,} of {len(stream):,}")
        self._judge(self.concluded.status, self.concluded.exit_code)
        return self.concluded

    def _judge(self, status: str, code: int) -> None:
        wanted = ENDINGS[self.run.expected]
        if status not in wanted[0] or code != wanted[1]:
            self.problems.append(f"concluded {status} ({code}) of a run that did {self.run.expected}")

    async def _work(self) -> None:
        try:
            while not await self._watch():
                await self.run.host.trusts.wait()
                self._begin()
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def _watch(self) -> bool:
        place = self.run.place(self._transport, self.keep)
        last: Sight | None = None
        try:
            async for last in Watcher(self.run.run_dir, place).sights():
                await self._see(last)
        except HostRefusal as error:
            if self.run.host.trusts.is_set() or "HAS CHANGED" not in str(error):
                self.problems.append(f"refused: {error}")
            self.refusals += 1
            return False
        finally:
            place.close()
        assert last is not None
        self.concluded = conclude(last.state, last.link.exit)
        return True

    async def _see(self, sight: Sight) -> None:
        batch = sight.batch
        if sight.link.problem and self._was_reached:
            self.unreached += 1
        self._was_reached = not sight.link.problem
        over = batch.status in ("ended", "lost")
        if over and self.run.goes_on:
            self.problems.append(f"called {batch.status} while it goes on")
        if sight.link.problem and (over or not sight.link.live):
            self.problems.append(f"called {batch.status} while it cannot be reached")
        if not batch.lines:
            return
        for event in batch.events:
            self.lost += max(0, event.seq - self._next)
            self.repeated += event.seq < self._next
            self._next = event.seq + 1
        if len(batch.events) != len(batch.lines):
            self.problems.append("a line that is no event")
        self._digest.update(b"".join(line + b"\n" for line in batch.lines))
        self._offset = batch.offset
        async with self._changed:
            self._latest, self._back = batch.events[-1].t, self.unreached
            self._changed.notify_all()


class Seat:
    """A real `kdconsole --headless attach`, a process of its own."""

    def __init__(self, run: FarRun, process: asyncio.subprocess.Process) -> None:
        self.run, self.process = run, process
        self.told: list[str] = []
        self.follows = False
        """It has told something of the run."""
        self._readers = [asyncio.create_task(self._listen()), asyncio.create_task(self._read())]
        self._out = b""

    @classmethod
    async def take(cls, run: FarRun) -> Seat:
        """Sits down and waits until the run is seen."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "console", "--headless", "attach", run.run_dir.id, "--json"),
            *("--evidence", str(run.host.evidence)),
            env=dict(run.host.variables()),
            cwd=run.host.root,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
        return cls(run, process)

    async def until_it_follows(self) -> None:
        await until(lambda: self.follows or self.process.returncode is not None, "a real console to see the run")

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        await self._gone()

    async def interrupt(self) -> int:
        """Ctrl-C; returns the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        await asyncio.wait_for(self._gone(), SECONDS)
        return self.code

    async def end(self, seconds: float = SECONDS) -> dict[str, Any]:
        """Waits until it ends by itself; returns what it printed, {} for nothing."""
        try:
            await asyncio.wait_for(self._gone(), seconds)
        except TimeoutError:
            await self.kill()
            raise AssertionError(f"a real console does not end: {self.told[-5:]}") from None
        return json.loads(self._out) if self._out else {}

    @property
    def code(self) -> int:
        assert self.process.returncode is not None
        return self.process.returncode

    async def _gone(self) -> None:
        await self.process.wait()
        await asyncio.wait(self._readers)

    async def _listen(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.told.append(line.decode().rstrip())
            self.follows = self.follows or not self.told[-1].startswith(("error", "gx10:"))

    async def _read(self) -> None:
        assert self.process.stdout is not None
        self._out = await self.process.stdout.read()

    async def problems(self, seconds: float = SECONDS) -> list[str]:
        """Waits for its end; what is wrong with its verdict, in sentences."""
        document = await self.end(seconds)
        statuses, code = ENDINGS[self.run.expected]
        if self.code == code and document.get("status") in statuses:
            return []
        told = f"{document.get('status')} ({self.code}): {self.told[-3:]}"
        return [f"a real console concluded {told} of a run that did {self.run.expected}"]
