"""Following a run: the same fold for one that ended and one that goes on, and when all of the past was read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from console.run_state import Reducer
from console.watch import Sight, Watcher, contract_of
from dispatch.places import Place
from dispatch.runs import RunDir, open_run
from dispatch.transport import LocalTransport
from engine.errors import ConfigError, RunError
from engine.stream import Event, decode_line, encode
from tests.console.run_dirs import make_run
from tests.streams import end_event, smoke_events, with_verdicts


async def sights_of(watcher: Watcher) -> list[Sight]:
    return [sight async for sight in watcher.sights()]


def test_a_past_run_is_folded_whole_and_its_end_is_known(tmp_path: Path) -> None:
    events = with_verdicts(smoke_events(30), end=end_event(30))
    run_dir = open_run(make_run(tmp_path, events))
    sights = asyncio.run(sights_of(Watcher(run_dir, Place(LocalTransport(), str(run_dir.path)))))
    last = sights[-1]
    assert last.state == Reducer(contract_of(run_dir)).feed(stored(run_dir))
    assert (last.link.status, last.link.live, last.link.host) == ("ended", False, "localhost")
    assert last.link.exit is not None
    assert last.link.exit.exit_code == 0


def stored(run_dir: RunDir) -> list[Event]:
    lines = (run_dir.path / "events.jsonl").read_bytes().splitlines()
    return [event for event in map(decode_line, lines) if event is not None]


def test_what_comes_after_the_opening_is_news_and_what_stood_there_is_not(tmp_path: Path) -> None:
    events = with_verdicts(smoke_events(4_000), end=end_event(4_000))
    run_dir = open_run(make_run(tmp_path, events[:-1], exit_code=None, living=True))
    stream = run_dir.path / "events.jsonl"
    size = stream.stat().st_size
    [run] = {e.run for e in stored(run_dir)}

    async def scenario() -> list[Sight]:
        seen: list[Sight] = []
        async for sight in Watcher(run_dir, Place(LocalTransport(), str(run_dir.path))).sights():
            seen.append(sight)
            if sight.state.end is not None:
                return seen
            if sight.caught_up and sight.batch.offset == size:
                with stream.open("ab") as file:
                    file.write(encode(msgspec.structs.replace(events[-1], run=run)))
        raise AssertionError("no end")

    seen = asyncio.run(scenario())
    assert seen[-1].caught_up
    assert all(s.caught_up == (s.batch.offset >= size) for s in seen if s.batch.lines)
    assert seen[0].batch.offset <= size


def test_a_run_without_a_contract_is_refused_by_name(tmp_path: Path) -> None:
    run_dir = open_run(make_run(tmp_path, with_verdicts(smoke_events(12))))
    (run_dir.path / "contract.yaml").unlink()
    with pytest.raises(RunError, match=r"contract\.yaml.*the contract that the run was started with"):
        Watcher(run_dir, Place(LocalTransport(), str(run_dir.path)))
    (run_dir.path / "contract.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="not UTF-8"):
        Watcher(run_dir, Place(LocalTransport(), str(run_dir.path)))
    (run_dir.path / "contract.yaml").write_text("nonsense: 1\n")
    with pytest.raises(ConfigError):
        Watcher(run_dir, Place(LocalTransport(), str(run_dir.path)))
