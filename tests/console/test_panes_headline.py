"""The head: three lines, four when narrow, and what is wrong before anything else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from rich.cells import cell_len

from console.run_state import Reducer
from console.view import Link, View
from console.widgets.headline import HeadLine, head_lines
from dispatch.manifest import ExitRecord, Manifest, host_facts
from engine.stream import Event
from tests.console.desk_app import shown
from tests.console.pane_views import (
    HOSTILE,
    Host,
    checkpoint,
    ended,
    failure,
    heartbeat,
    log_events,
    numbered,
    train_events,
    view_of,
)
from tests.streams import EPOCH, RUN, end_event, smoke_contract, smoke_events

NAMES: dict[str, Any] = {
    "teacher": "/models/coder-1.5b",
    "student": "hf/qwen-0.5b/",
    "host": "gx10",
    "device_name": "NVIDIA GB10",
}
EVENTS = train_events(1_250, **NAMES)
BROKEN = train_events(1_250, loss=lambda step: float("nan") if step == 1_200 else 2.0, **NAMES)
WIDTHS = (240, 120, 100, 99, 76, 75, 60, 40, 30, 12, 1)


@pytest.fixture(autouse=True)
def _in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def text(view: View, width: int = 120) -> list[str]:
    return [line.plain for line in head_lines(view, width)]


def over(events: list[Event], **changes: object) -> View:
    end = msgspec.structs.replace(end_event(1_250, **changes), run=RUN, seq=10**6, t=events[-1].t + 5)
    return ended(view_of([*events, end]))


def stalled() -> View:
    return view_of(numbered([*EVENTS, heartbeat(EVENTS[-1].t + 240)]), 2)


def in_the_past() -> View:
    view = view_of(EVENTS)
    t = view.state.last_t - 600
    return replace(view, state=view.state.at(t), now=t, scrubbed=True, last_t=view.state.last_t)


VIEWS = {
    "nothing": View(),
    "starting": view_of(EVENTS[:2]),
    "loading": view_of(EVENTS[:4]),
    "running": view_of(EVENTS, 1.2),
    "stalled": stalled(),
    "silent": view_of(EVENTS, 190),
    "unreachable": view_of(EVENTS, 400, problem="ssh: connect to host gx10 port 22: No route to host"),
    "failing": view_of(BROKEN),
    "failed": over(EVENTS, status="FAILED", exit_code=1, reason="the loss of step 1,250 is nan"),
    "disputed": over(EVENTS),
    "lost": view_of(EVENTS, 0, status="lost", live=False),
    "dead on arrival": view_of(EVENTS[1:2], 0, status="ended", live=False),
    "nothing but dead": View(link=Link(status="lost", live=False)),
    "past": in_the_past(),
    "noted": replace(view_of(EVENTS), notes=("since the run ended: events.jsonl: changed", "another")),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_three_lines_or_four_of_exactly_the_width(name: str, width: int) -> None:
    lines = text(VIEWS[name], width)
    assert len(lines) == (3 if width >= 76 else 4)
    assert [cell_len(line) for line in lines] == [width] * len(lines)


def test_all_three_questions_are_answered_while_a_run_goes_on() -> None:
    first, second, third = text(VIEWS["running"])
    told = "kdconsole coder-1.5b > qwen-0.5b gx10 · NVIDIA GB10 ▶ RUNNING train 1,250 / 5,000"
    assert " ".join(first.split()) == told
    assert "25 %" in second
    assert "ETA 1h 2" in second
    assert "ends Thu 10:" in second
    assert "held-out 10.00 → 2.308" in second
    assert third.startswith("◌ 15 PENDING")
    assert third.rstrip().endswith("link ● 38 ms   heartbeat 2 s   last step 1 s   ckpt 1,200 verified")


@pytest.mark.parametrize("width", [120, 80])
def test_when_data_stops_the_head_says_so_first(width: int) -> None:
    first = text(VIEWS["stalled"], width)[0]
    assert first.startswith(" ⚠ no step for 4 min · heartbeat 2 s · phase train ")
    assert "⚠ STALLED" in first
    assert text(VIEWS["silent"], width)[0].startswith(" ⚠ nothing heard for 3 min · last step 3 min ago")
    assert text(VIEWS["unreachable"], width)[0].startswith(" ⌁ gx10 cannot be reached · last heard 7 min ago")


def test_the_narrowest_head_keeps_what_is_wrong() -> None:
    assert text(VIEWS["stalled"], 30)[0].strip() == "⚠ no step for 4 min"
    assert text(VIEWS["failing"], 30)[2].startswith("✘ 1 FAIL")
    assert text(VIEWS["running"], 30)[0].startswith("▶ RUNNING")
    assert "ETA 1h" in text(VIEWS["running"], 30)[1]


def test_a_fail_is_said_before_the_names_and_the_next_worst_after_it() -> None:
    failing = train_events(1_250, loss=lambda step: float("nan") if step == 1_100 else 2.0, failed=[1_200], **NAMES)
    line = head_lines(view_of(failing), 120)[0]
    assert line.plain.startswith(" ✘ FAIL F-FINITE-001: nan at step 1100 · checkpoint 1,200 FAILED ")
    assert "reverse" in str(line.spans[0].style)
    assert "▶ RUNNING" in line.plain
    assert "checkpoint" not in text(view_of(failing), 60)[0]
    assert text(view_of(failing), 60)[2].rstrip().endswith("ckpt 1,200 FAILED, last good 800")


def test_a_stall_is_worse_than_a_fail_which_is_named_below() -> None:
    first, _, third = text(replace(VIEWS["failing"], now=VIEWS["failing"].now + 300))
    assert first.startswith(" ⚠ nothing heard for 5 min")
    assert third.startswith("✘ 1 FAIL   F-FINITE-001   ◌ 14 PENDING")


@pytest.mark.parametrize("width", [120, 80, 60])
def test_a_spike_stands_before_the_verdicts(width: int) -> None:
    spiked = view_of(train_events(1_250, loss=lambda step: 10.0 if step == 1_000 else 2.0, **NAMES))
    assert text(spiked, width)[2].startswith("⚠ spike 5x at step 1,000 ")


def test_a_held_out_loss_that_rose_is_marked() -> None:
    rising = view_of(train_events(1_250, loss=lambda step: 2.0 + step / 1_000, **NAMES))
    for width, line in ((120, 1), (80, 1), (60, 3)):
        assert "⚠ held-out 2.000 → 3.000" in text(rising, width)[line]
        assert "⚠" not in text(VIEWS["running"], width)[line]


def test_nothing_is_said_twice_when_a_run_is_over() -> None:
    for width in (120, 80, 60):
        assert " ".join(text(VIEWS["failed"], width)).count("exit 1") == 1


def test_an_estimate_of_what_stands_still_says_so() -> None:
    assert "once it goes on" in text(VIEWS["stalled"])[1]
    assert "if it goes on" in text(VIEWS["unreachable"])[1]


def test_a_failed_verdict_comes_first_in_shape_word_and_colour() -> None:
    line = head_lines(VIEWS["failing"], 120)[2]
    assert line.plain.startswith("✘ 1 FAIL   ◌ 14 PENDING")
    assert any("$error" in str(span.style) and span.start == 0 for span in line.spans)


def test_the_three_clocks_are_told_apart() -> None:
    assert "⚠ last step 4 min" in text(VIEWS["stalled"])[2]
    assert "⚠ heartbeat" not in text(VIEWS["stalled"])[2]
    assert "⚠ heartbeat 3 min" in text(VIEWS["silent"])[2]
    assert "link ⌁ down" in text(VIEWS["unreachable"])[2]


def test_the_past_is_unmistakable() -> None:
    first = text(VIEWS["past"])[0]
    assert first.startswith(" ⏪ as of ")
    assert f" · step {VIEWS['past'].state.last_step.step:,} · " in first  # type: ignore[union-attr]
    assert "0: now" in first
    assert "heartbeat" not in "".join(text(VIEWS["past"]))


def test_the_end_tells_outcome_reason_duration_and_what_the_exit_code_means() -> None:
    first, second, third = text(VIEWS["failed"])
    assert first.startswith(" ✘ the loss of step 1,250 is nan ")
    assert "✘ FAILED" in first
    assert "took 40.0 s" in second
    assert "exit 1: a fatal or gate verdict is FAIL" in second
    assert "held-out 10.00 → 2.308   ended 2025-10-09 09:2" in third
    assert "link" not in third
    assert "DISPUTED" in text(VIEWS["disputed"])[0]
    assert "neither an end nor a process was found" in text(VIEWS["lost"])[0]
    assert "exit 1: a fatal" in text(VIEWS["failed"], 60)[3]


def test_a_run_that_ended_well_says_why_it_ended() -> None:
    events = smoke_events(12)
    state = Reducer(smoke_contract()).feed([*events])
    good = replace(state, end=msgspec.structs.replace(end_event(), t=state.last_t))
    good = replace(good, stated={v.id: v for v in good.judged})
    lines = text(View(state=good, link=Link(status="ended", live=False), now=good.last_t))
    assert "■ COMPLETED   12 steps" in lines[0]
    assert "100 %" in lines[1]
    assert "the time budget is reached" in lines[1]
    assert "exit 0: every fatal and gate verdict is PASS" in lines[1]
    assert "ckpt" not in lines[2]


def test_where_the_reason_of_a_failure_is_too_long_what_was_observed_is_left() -> None:
    reason = "F-FINITE-001: expected step.loss always finite, observed NaN at step 1200"
    end = msgspec.structs.replace(end_event(1_250), status="FAILED", exit_code=1, reason=reason, t=BROKEN[-1].t)
    view = ended(view_of(numbered([*BROKEN, end])))
    assert text(view, 120)[0].startswith(f" ✘ {reason} ")
    assert text(view, 60)[0].startswith(" ✘ F-FINITE-001: nan at step 1200 ")
    assert "F-FINITE" not in text(view, 120)[2]


def test_a_run_that_crashed_tells_how_first_and_promises_no_checkpoint() -> None:
    died = ended(
        view_of(EVENTS[:400]), exit=ExitRecord(v=1, run=RUN, exit_code=None, signal=9, started=0, ended=1, seconds=1)
    )
    for width in (120, 80, 60):
        assert text(died, width)[0].startswith(" ✖ killed by SIGKILL")
        assert "no ckpt yet" not in text(died, width)[2]


def test_a_failed_checkpoint_is_loud_and_names_the_last_good_one() -> None:
    t = EVENTS[-1].t
    events = numbered([*EVENTS, failure(1_250, t=t)])
    line = head_lines(view_of(events), 120)[2]
    assert line.plain.rstrip().endswith("ckpt 1,250 FAILED, last good 1,200")
    assert "$error" in str(line.spans[-1].style)


def test_notes_are_shown_even_where_room_is_short() -> None:
    assert "⚠ since the run ended: events.jsonl: changed (and 1 more)" in text(VIEWS["noted"])[2]
    assert "⚠ since the run ended: e" in text(VIEWS["noted"], 30)[2]


def test_a_stream_that_broke_after_the_end_is_noted() -> None:
    view = over(EVENTS)
    view = replace(view, link=replace(view.link, problem="events.jsonl was replaced"))
    assert "⚠ events.jsonl was replaced" in text(view)[2]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_are_shown_as_they_are_and_break_no_line(hostile: str) -> None:
    manifest = Manifest(
        run=RUN, id="run", name=hostile + "\n\x1b[31m", mode="train", created="", created_unix=EPOCH, host=host_facts(),
        versions={}, config_fingerprint="", gate_fingerprint="", contract_sha256="",
    )  # fmt: skip
    names = dict.fromkeys(("teacher", "student", "host", "device_name"), hostile)
    events = [*train_events(30, **names), *log_events([hostile])]
    view = replace(view_of(events), manifest=manifest, notes=(hostile, hostile))
    for width in WIDTHS:
        lines = text(view, width)
        assert [cell_len(line) for line in lines] == [width] * len(lines)
        assert not any("\x1b" in line or "\n" in line for line in lines)
    if len(hostile) < 20:
        assert hostile in text(view, 240)[0]


@pytest.mark.parametrize(("width", "height"), [(120, 3), (100, 3), (80, 3), (60, 4), (30, 4)])
def test_the_widget_is_as_high_as_its_lines(width: int, height: int) -> None:
    async def scenario() -> None:
        app = Host(HeadLine())
        async with app.run_test(size=(width, 10)) as pilot:
            app.query_one(HeadLine).show(VIEWS["stalled"])
            await pilot.pause()
            assert app.pane.size.height == height
            assert shown(app).splitlines()[0].startswith("  ⚠ no step for 4 min")
            assert app.query_one(HeadLine).copy_text().splitlines()[0].startswith(" ⚠ no step for 4 min")

    asyncio.run(scenario())


def test_an_unchanged_view_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        app = Host(HeadLine())
        async with app.run_test(size=(120, 10)) as pilot:
            head = app.query_one(HeadLine)
            head.show(VIEWS["failed"])
            await pilot.pause()
            drawn: list[object] = []
            monkeypatch.setattr(head, "refresh", lambda *a, **k: drawn.append(a))
            head.show(replace(VIEWS["failed"]))
            assert drawn == []
            head.show(VIEWS["stalled"])
            assert drawn

    asyncio.run(scenario())


def test_the_checkpoint_stays_beside_a_fail() -> None:
    t = BROKEN[-1].t
    events = numbered([*BROKEN, checkpoint(1_250, t=t)])
    assert "ckpt 1,250" in text(view_of(events), 60)[2]
