"""Following a run over SSH through every loss of the connection: nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest

from console.run_state import Reducer
from console.watch import Sight, Watcher, contract_of
from dispatch import host_keys
from dispatch.places import Place
from dispatch.runs import open_run
from dispatch.ssh import SSHTransport
from dispatch.transport import HostRefusal
from engine.stream import decode_line, encode
from tests.console.run_dirs import make_run
from tests.ssh_rig import MISSING, Rig, make_key, running_sshd
from tests.streams import end_event, smoke_events, with_verdicts

pytestmark = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))
KILLS = 20


async def trusted(rig: Rig) -> SSHTransport:
    host_keys.trust(rig.host, await host_keys.presented_key(rig.host, rig.environ), rig.environ)
    return SSHTransport(rig.host, rig.environ)


def test_no_event_is_lost_or_repeated_while_connections_are_killed(tmp_path: Path) -> None:
    events = with_verdicts(smoke_events(20_000), end=end_event(20_000))
    run_dir = open_run(make_run(tmp_path / "runs", events[:1], exit_code=None, living=True))
    stream = run_dir.path / "events.jsonl"
    again: list[float] = []

    async def write() -> None:
        """Some thousands of events a second, and half a line now and then."""
        data = b"".join(encode(msgspec.structs.replace(event, run=run_dir.run)) for event in events[1:])
        with stream.open("ab", buffering=0) as file:
            for begin in range(0, len(data), 30_001):
                file.write(data[begin : begin + 30_001])
                await asyncio.sleep(0.02)

    async def kill(rig: Rig, seen: list[Sight]) -> None:
        for _ in range(KILLS):
            await asyncio.sleep(0.1)
            for pid in rig.sessions():
                os.kill(pid, signal.SIGKILL)
            killed, before = time.monotonic(), len([s for s in seen if s.batch.lines])
            while len([s for s in seen if s.batch.lines]) == before and not writing.done():
                await asyncio.sleep(0.005)
            again.append(time.monotonic() - killed)

    async def scenario(rig: Rig) -> list[Sight]:
        nonlocal writing  # which `kill` looks at
        transport = await trusted(rig)
        seen: list[Sight] = []
        writing = asyncio.create_task(write())
        killing = asyncio.create_task(kill(rig, seen))
        async for sight in Watcher(run_dir, Place(transport, str(run_dir.path))).sights():
            seen.append(sight)
            if sight.state.end is not None:
                break
        await killing
        await transport.close()
        return seen

    writing: asyncio.Task[None]
    with running_sshd(tmp_path / "host") as rig:
        seen = asyncio.run(scenario(rig))
    lines = [line for sight in seen for line in sight.batch.lines]
    assert b"".join(line + b"\n" for line in lines) == stream.read_bytes()
    assert seen[-1].state.steps.column("step").tolist() == list(range(1, 20_001))
    assert any(s.link.problem for s in seen), "no connection was ever lost"
    assert len(again) == KILLS
    assert sorted(again)[KILLS // 2] < 0.5


def test_the_state_over_ssh_is_that_of_the_directory(tmp_path: Path) -> None:
    run_dir = open_run(make_run(tmp_path / "runs", with_verdicts(smoke_events(50), end=end_event(50))))

    async def scenario(rig: Rig) -> Sight:
        transport = await trusted(rig)
        last = [sight async for sight in Watcher(run_dir, Place(transport, str(run_dir.path))).sights()][-1]
        await transport.close()
        return last

    with running_sshd(tmp_path / "host") as rig:
        last = asyncio.run(scenario(rig))
    lines = (run_dir.path / "events.jsonl").read_bytes().splitlines()
    reducer = Reducer(contract_of(run_dir))
    assert last.state == reducer.feed([event for event in map(decode_line, lines) if event is not None])
    assert (last.link.host, last.link.status) == ("gx10", "ended")
    assert last.link.latency_seconds is not None


def test_a_host_whose_key_has_changed_is_not_asked_again(tmp_path: Path) -> None:
    events = with_verdicts(smoke_events(50))
    run_dir = open_run(make_run(tmp_path / "runs", events, exit_code=None, living=True))

    async def scenario(rig: Rig) -> None:
        watcher = Watcher(run_dir, Place(await trusted(rig), str(run_dir.path)))
        async for sight in watcher.sights():
            if sight.caught_up and not sight.link.problem:
                rig.end()
                make_key(rig.directory / "host_key")
                rig.restart()

    with running_sshd(tmp_path / "host") as rig, pytest.raises(HostRefusal, match="HAS CHANGED"):
        asyncio.run(scenario(rig))
