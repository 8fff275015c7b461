"""A stop that takes its time says what it waits for; what is left is told with it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from dispatch_rig import Run, until

from dispatch import stopping
from dispatch.places import Place
from dispatch.runs import Stop
from dispatch.stopping import Stopped, stop_run, where
from dispatch.survey import HostCheckpoint
from dispatch.transport import LocalTransport
from engine.stream import Event, Heartbeat, Phase, encode
from tests.streams import EPOCH, stamped, step_event

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
)
EVENTS: list[Event] = [Phase(name="train"), step_event(7, 1.0), Phase(name="load-teacher", detail="x")]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_SECONDS", 0.1)


def test_what_is_waited_for_is_told_and_that_it_took_sigkill(run: Run) -> None:
    (run.path / "dispatch.json").write_text(json.dumps({"run": run.run, "mode": "train"}))
    run.start(STUBBORN)
    run.said("deaf")
    (run.path / "events.jsonl").write_bytes(b"".join(map(encode, stamped(EVENTS))) + b'{"torn')
    said: list[str] = []
    place = Place(LocalTransport(), str(run.path))
    done = asyncio.run(stop_run(place, grace=2.0, kill=True, say=said.append))
    assert "it is in phase load-teacher" in said[0]
    assert "a file that is being loaded is loaded to its end" in said[0]
    assert said[-1] == "the grace is over: SIGKILL"
    assert done.stop.killed
    assert done.describe().startswith("CANCELLED: killed by SIGKILL, after it did not heed SIGTERM in time")
    assert done.describe().endswith("; none of its 7 steps is saved in a checkpoint")
    until(lambda: run.status()["state"] == "ended", "its end")


def test_the_phase_and_how_long_it_lasts_follow_from_the_end_of_the_stream() -> None:
    beat = Heartbeat(phase="load-teacher", step=0, rss_bytes=1, t=EPOCH + 30)
    assert where([]) == ("", None)
    assert where(stamped([Phase(name="load-teacher", t=EPOCH), beat])) == ("load-teacher", 30.0)
    assert where(stamped([beat])) == ("load-teacher", None)


@pytest.mark.parametrize(
    ("result", "step", "saved", "ending"),
    [
        ("stopped", 120, 120, "; 120 steps saved in checkpoints/ckpt-step-000120"),
        ("stopped", 125, 120, "; 120 of 125 steps saved in checkpoints/ckpt-step-000120"),
        ("stopped", None, None, "not recorded"),
        ("still_running", 125, 120, "ends first"),
    ],
)
def test_how_much_is_saved_is_told(result: Any, step: int | None, saved: int | None, ending: str) -> None:
    found = None if saved is None else HostCheckpoint(name=f"ckpt-step-{saved:06d}", bytes=1, sha256="")
    stop = Stop(state="ended", run="u", result=result)
    assert Stopped(stop, step, found).describe().endswith(ending)
    assert Stopped(stop, step, found, "smoke").describe() == stop.describe()
