"""Three clocks: each by itself, each with its budget, and nothing said of what could not be asked."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from dispatch_rig import Run, until

from dispatch import follower as module
from dispatch.follower import Batch, Follower
from dispatch.liveness import (
    FIRST_STEP_SECONDS,
    HEARTBEAT_SECONDS,
    OTHER_PHASE_SECONDS,
    STEP_SECONDS,
    SUPERVISOR_SECONDS,
    Clocks,
)
from dispatch.manifest import SupervisorHeartbeat
from dispatch.transport import LocalTransport
from engine.stream import Eval, Event, Heartbeat, Phase, Step, Verdict


def beat(t: float) -> Heartbeat:
    return Heartbeat(t=t, phase="train", step=1, rss_bytes=1)


def step(t: float, number: int = 1, seconds: float = 1.0) -> Step:
    return Step(t=t, step=number, loss=1.0, ce=1.0, kd=1.0, lr=1.0, grad_norm=1.0, tokens=1, seconds=seconds)


def phase(t: float, name: str, budget: float | None = None) -> Phase:
    return Phase(t=t, name=name, budget_seconds=budget)


def clocks_of(*events: Event, then: Sequence[float] = ()) -> Clocks:
    """Clocks that were told of these events, and then so many seconds later, each time, that there is nothing new."""
    clocks = Clocks()
    now = 1000.0
    clocks.heard(now, True, events)
    for later in then:
        now += later
        clocks.heard(now, False, ())
    return clocks


def test_a_run_of_which_everything_is_fresh_is_alive() -> None:
    told = clocks_of(phase(0, "train"), step(1), beat(2)).at_once()
    assert told.state == "ALIVE"
    assert told.link.seconds < 10
    assert (told.heartbeat.seconds, told.progress.seconds, told.phase) == (0.0, 1.0, "train")


def test_silence_is_what_the_host_was_asked_about_and_nothing_else() -> None:
    seconds = [1.0] * int(HEARTBEAT_SECONDS)
    assert clocks_of(beat(0), then=seconds).at_once().state == "ALIVE"
    assert clocks_of(beat(0), then=[*seconds, 0.5]).at_once().state == "SILENT"
    # A console that slept for an hour, or a link that did, has asked nobody in that hour.
    assert clocks_of(beat(0), then=[3600.0]).at_once().state == "ALIVE"
    assert clocks_of(beat(0), then=[3600.0]).silent_seconds < HEARTBEAT_SECONDS


def test_a_line_ends_a_silence() -> None:
    clocks = clocks_of(beat(0), then=[4.0] * 6)
    clocks.heard(2000.0, True, [beat(30)])
    assert clocks.at_once().state == "ALIVE"
    assert clocks.silent_seconds == 0.0


@pytest.mark.parametrize("seconds", [[], [4.0] * 10])
def test_what_is_not_reached_is_unknown_whatever_the_clocks_show(seconds: list[float]) -> None:
    clocks = clocks_of(phase(0, "train"), beat(9e6), then=seconds)
    told = clocks.at_once(reached=False)
    assert told.state == "UNKNOWN"
    assert (told.heartbeat.late, told.progress.late) == (bool(seconds), True)


def test_a_heartbeat_is_no_progress_and_neither_is_what_a_judge_says() -> None:
    said = Verdict(t=2e3, id="F", verdict="FAIL", severity="gate", claim="", expected="", observed="", step=1)
    told = clocks_of(phase(0, "train"), *(step(n, n) for n in range(1, 9)), beat(1e3), said, beat(3e3)).at_once()
    assert told.state == "STALLED"
    assert (told.progress.seconds, told.progress.budget) == (3e3 - 8, STEP_SECONDS)


def test_every_phase_has_a_budget_and_the_first_step_has_its_own() -> None:
    def allowed(*events: Event) -> float:
        return clocks_of(*events).at_once().progress.budget

    assert allowed() == allowed(phase(0, "import")) < OTHER_PHASE_SECONDS
    assert allowed(phase(0, "load-data", 77.0)) == 77.0
    assert allowed(phase(0, "load-data")) == OTHER_PHASE_SECONDS
    assert allowed(phase(0, "train")) == FIRST_STEP_SECONDS
    assert allowed(phase(0, "train"), step(1, seconds=0.1)) == STEP_SECONDS
    assert allowed(phase(0, "train"), step(1, seconds=10.0)) == 200.0
    slow = Eval(t=2, step=1, loss=1.0, ce=1.0, kd=1.0, tokens=1, seconds=400.0)
    assert allowed(phase(0, "train"), step(1, seconds=0.1), slow) == 800.0
    assert allowed(phase(0, "train"), step(1), phase(2, "train")) == FIRST_STEP_SECONDS, (
        "another attempt compiles again"
    )
    assert allowed(phase(0, "train"), step(1, seconds=float("inf"))) == STEP_SECONDS


def test_a_clock_that_was_set_back_makes_no_stall() -> None:
    told = clocks_of(phase(0, "train"), step(5e9), beat(10)).at_once()
    assert (told.progress.seconds, told.state) == (0.0, "ALIVE")
    assert clocks_of(beat(float("nan"))).at_once().state == "ALIVE"


def test_a_supervisor_whose_heartbeat_does_not_move_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dispatch.liveness.time.monotonic", lambda: now[0])
    clocks = Clocks()
    for number in (1, 2, 2, 2):
        clocks.supervised(SupervisorHeartbeat(run="r", beat=number, t=0.0, phase="train", waited_seconds=0.0))
        now[0] += SUPERVISOR_SECONDS / 2 + 1
    assert clocks.at_once().unsupervised
    clocks.supervised(SupervisorHeartbeat(run="r", beat=3, t=0.0, phase="train", waited_seconds=0.0))
    assert not clocks.at_once().unsupervised
    clocks.supervised(None)
    now[0] += 1e6
    assert not clocks.at_once().unsupervised, "an older supervisor has none"


TRAINER = """
import json, os, threading, time
run, seq, lock = json.load(open('dispatch.json'))['run'], 0, threading.Lock()
def emit(event, **fields):
    global seq
    with lock, open('events.jsonl', 'a') as file:
        file.write(json.dumps(dict(event=event, v=1, run=run, seq=seq, t=time.time(), **fields)) + chr(10))
        seq += 1
def beat():
    while True:
        emit('heartbeat', phase='train', step=1, rss_bytes=1)
        time.sleep(0.3)
emit('phase', name='train')
threading.Thread(target=beat, daemon=True).start()
while not os.path.exists('go'): time.sleep(0.01)
"""


def test_a_follower_hears_of_the_stall_that_the_supervisor_saw(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SUPERVISOR_SECONDS", 0.1), ("SUPERVISOR_SOON_SECONDS", 0.1), ("TICK_SECONDS", 0.05)):
        monkeypatch.setattr(module, name, seconds)
    run.supervise(stall_seconds=0.3)
    run.start(TRAINER)
    until((run.path / "events.jsonl").exists, "the stream")

    async def scenario() -> list[Batch]:
        seen = []
        async for batch in Follower(LocalTransport(), run.path, run.run, python=sys.executable).batches(0.01):
            seen.append(batch)
            live = batch.liveness
            if live is not None and live.supervisor is not None and live.supervisor.stall is not None:
                (run.path / "go").touch()
        return seen

    seen = asyncio.run(asyncio.wait_for(scenario(), 60))
    stalls = [b.liveness.supervisor.stall for b in seen if b.liveness is not None and b.liveness.supervisor is not None]
    [first, *_] = [stall for stall in stalls if stall is not None]
    assert (first.phase, first.allowed_seconds) == ("train", 0.3)
    assert all(b.liveness is not None and b.liveness.state == "ALIVE" for b in seen[:-1]), "by its own, longer budget"
    assert (seen[-1].status, seen[-1].liveness) == ("ended", None)


class Held(LocalTransport):
    """A link that freezes: the answer was given at once, and comes late."""

    async def read(self, path: str, offset: int, limit: int, *, timeout: float = 30.0) -> bytes:
        data = await super().read(path, offset, limit, timeout=timeout)
        if not data[1:] and path.endswith("events.jsonl"):
            await asyncio.sleep(1.5)
        return data


def test_an_answer_that_comes_late_is_no_silence_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.0)
    line = '{"event":"log","v":1,"run":"r","seq":0,"t":1.0,"level":"info","message":""}\n'
    (tmp_path / "events.jsonl").write_text(line)

    async def scenario() -> float:
        batches = Follower(Held(), tmp_path, "r").batches(0.0)
        assert (await anext(batches)).lines
        return (await anext(batches)).silent_seconds

    assert asyncio.run(scenario()) < 1.0


def test_what_stands_in_the_place_of_a_heartbeat_is_passed_over(run: Run, tmp_path: Path) -> None:
    follower = Follower(LocalTransport(), run.path, run.run)
    path = run.path / "supervisor.heartbeat"
    assert asyncio.run(follower._supervisor_heartbeat()) is None
    for text in ("", "{", "[]", '{"run": 1}', '{"run":"another","beat":1,"t":0,"phase":"x","waited_seconds":0}'):
        path.write_text(text)
        assert asyncio.run(follower._supervisor_heartbeat()) is None
    path.write_text(f'{{"run":"{run.run}","beat":1,"t":0,"phase":"\\u001b[31m","waited_seconds":0}}' + " " * 500 + "\n")
    told = asyncio.run(follower._supervisor_heartbeat())
    assert told is not None
    assert os.linesep not in told.phase
    assert "\x1b" not in told.phase
