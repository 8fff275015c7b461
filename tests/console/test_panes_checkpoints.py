"""The checkpoint timeline: marks on the axis of steps, labels that keep apart, details of one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from console.view import View
from console.widgets.checkpoints import Checkpoints, details, timeline
from engine.stream import Checkpoint, CheckpointFailed, Event
from tests.console.desk_app import shown
from tests.console.pane_views import (
    HOSTILE,
    SHAPES,
    Host,
    checkpoint,
    ended,
    failure,
    numbered,
    train_events,
    view_of,
)
from tests.streams import EPOCH, smoke_events

EVENTS = train_events(1_240, checkpoint_every=10**6)


def marked_view(*marks: Event, **link: object) -> View:
    return view_of(numbered([*EVENTS, *marks]), 0.0, **link)


MARKS = (
    checkpoint(250, t=EPOCH + 300),
    checkpoint(500, kind="best+periodic", t=EPOCH + 600),
    failure(750, t=EPOCH + 900),
    checkpoint(1_000, kind="periodic", t=EPOCH + 1_200),
    checkpoint(1_100, kind="interrupt", t=EPOCH + 1_300),
)


def axis(view: View, width: int = 101) -> str:
    return timeline(view, width)[0].plain


def labels(view: View, width: int = 101) -> str:
    return timeline(view, width)[1].plain


def test_marks_stand_where_their_steps_are_and_dashes_where_nothing_is_yet() -> None:
    line = axis(marked_view(*MARKS))
    assert {index: mark for index, mark in enumerate(line) if mark not in "─ "} == {
        5: "●",
        10: "★",
        15: "✘",
        20: "●",
        22: "◆",
        25: "○",
    }
    assert line[:5] == "─" * 5
    assert "─ ─ ─ ─" in line[30:]
    assert " " not in line[:25]


def test_a_final_one_stands_at_the_end() -> None:
    assert axis(marked_view(*MARKS, checkpoint(5_000, kind="final", t=EPOCH + 2_000)))[-1] == "◉"


def test_labels_name_steps_and_rare_kinds_under_their_marks() -> None:
    line = labels(marked_view(*MARKS))
    assert line.index("next 1.25k") == 25
    assert line.index("750") == 15
    assert "1.1k" not in line  # there is no room for it beside the next one
    wide = labels(marked_view(*MARKS), 301)
    for text in ("250", "500 best", "750 failed", "1k ", "1.1k "):
        assert text in wide


def test_the_next_one_is_told_once_the_period_is_known() -> None:
    view = view_of(train_events(900, checkpoint_every=400), 0.0)
    assert "next 1.2k in 7 min" in labels(view)
    assert axis(view)[24] == "○"
    assert "next" not in labels(view_of(train_events(300, checkpoint_every=400)))
    assert "next" not in labels(ended(view))
    assert "○" not in axis(ended(view_of(train_events(900, checkpoint_every=400), status="lost")))


def test_one_that_is_due_now_is_being_saved() -> None:
    events = train_events(1_200, checkpoint_every=400)
    before = view_of(events[: next(i for i, e in enumerate(events) if getattr(e, "path", "").endswith("1200"))])
    assert before.state.last_step is not None
    assert before.state.last_step.step == 1_200
    assert "saving 1.2k" in labels(before)
    assert "next 1.6k" in labels(view_of(events))


def test_no_time_is_promised_while_nothing_moves() -> None:
    stalled = view_of(train_events(900, checkpoint_every=400), 300)
    assert "next 1.2k" in labels(stalled)
    assert " in " not in labels(stalled)


UNMARKED = view_of(EVENTS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5_200), max_size=60), st.integers(1, 240))
def test_labels_never_touch_each_other(steps: list[int], width: int) -> None:
    marks = [checkpoint(step, kind="best" if step % 3 else "periodic", t=EPOCH) for step in sorted(steps)]
    lines = timeline(replace(UNMARKED, state=replace(UNMARKED.state, checkpoints=tuple(marks))), width)
    assert [cell_len(line.plain) for line in lines] == [width, width]
    known = {"best", "next", "saving", "in", "min", "s"}
    numbers = [word for word in lines[1].plain.split() if word not in known]
    assert all(len(word) <= 6 for word in numbers), lines[1].plain


def test_where_many_share_a_cell_the_failed_one_is_seen() -> None:
    marks = [checkpoint(step, t=EPOCH) for step in range(1_000, 1_020)]
    marks.insert(5, failure(1_005, t=EPOCH))  # type: ignore[arg-type]
    assert "✘" in axis(marked_view(*marks), 50)


def test_ten_thousand_checkpoints_are_drawn_in_a_moment() -> None:
    view = marked_view(*(checkpoint(step % 5_000, t=EPOCH) for step in range(10_000)))
    started = time.process_time()
    timeline(view, 200)
    assert time.process_time() - started < 0.5


def test_details_name_everything_that_was_recorded() -> None:
    def told(mark: Checkpoint | CheckpointFailed, newest: bool = True) -> str:
        return " · ".join(part.plain for part in details(mark, newest=newest))

    assert told(MARKS[0]) == (
        "250  ● periodic · ✔ verified · 988 MB · 291 tensors · sha256 9f2c0000… · 4.1 s (waited 0.2 s)"
    )
    assert "★ best + periodic" in told(MARKS[1])
    assert told(MARKS[2]) == "750  ✘ periodic · FAILED: No space left on device · after 3.1 s"
    assert "verified when saved" in told(MARKS[0], newest=False)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_stay_texts(hostile: str) -> None:
    async def scenario() -> None:
        pane = Checkpoints()
        app = Host(pane)
        async with app.run_test(size=(120, 24)) as pilot:
            pane.show(marked_view(checkpoint(7, kind=hostile, sha256=hostile, t=EPOCH), failure(8, error=hostile)))
            await pilot.pause()
            if len(hostile) < 20:
                assert f"FAILED: {hostile}" in shown(app)
            await pilot.press("left")
            assert "of 2" in " ".join(shown(app).split())

    asyncio.run(scenario())


def test_arrows_choose_and_past_the_last_one_the_newest_is_followed_again() -> None:
    async def scenario() -> None:
        pane = Checkpoints()
        app = Host(pane)
        async with app.run_test(size=(100, 8)) as pilot:
            pane.show(marked_view(*MARKS))
            await pilot.pause()
            assert "1,100  ◆ interrupt" in shown(app)
            assert "newest" in shown(app)
            await pilot.press("left", "left")
            assert "750  ✘ periodic" in shown(app)
            assert "3 of 5" in shown(app)
            more = checkpoint(1_200, t=EPOCH + 2_000)
            pane.show(marked_view(*MARKS, more))
            await pilot.pause()
            assert "3 of 6" in shown(app)  # it stays on what was chosen
            await pilot.press("home")
            assert "250  ● periodic" in shown(app)
            await pilot.press("left")
            assert "1 of 6" in shown(app)
            await pilot.press("end")
            assert "newest" in shown(app)
            pane.show(marked_view(*MARKS, more, checkpoint(1_240, t=EPOCH + 2_100)))
            await pilot.pause()
            assert "1,240  ● periodic · ✔ verified" in shown(app)

    asyncio.run(scenario())


def test_a_click_on_the_timeline_chooses_the_nearest() -> None:
    async def scenario() -> None:
        pane = Checkpoints()
        app = Host(pane)
        async with app.run_test(size=(105, 8)) as pilot:
            pane.show(marked_view(*MARKS))
            await pilot.pause()
            await pilot.click(pane, offset=(2 + 14, 1))
            assert "750  ✘ periodic" in shown(app)
            assert "3 of 5" in shown(app)

    asyncio.run(scenario())


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_it_shows_what_it_can_in_any_shape(width: int, height: int) -> None:
    async def scenario() -> None:
        pane = Checkpoints()
        app = Host(pane)
        async with app.run_test(size=(width, height)) as pilot:
            pane.show(marked_view(*MARKS))
            await pilot.pause()
            assert "Checkpoints" in shown(app)
            assert "✘" in shown(app).split("\n", 1)[1]
            assert "1,100  ◆ interrupt" in shown(app)
            assert "1,100  ◆ interrupt" in pane.copy_text()
            await pilot.resize_terminal(8, 3)
            await pilot.pause()

    asyncio.run(scenario())


def test_a_run_without_checkpoints_says_what_that_means() -> None:
    async def scenario() -> None:
        pane = Checkpoints()
        app = Host(pane)
        async with app.run_test(size=(80, 8)) as pilot:
            for view, text in (
                (View(), "No checkpoint yet."),
                (marked_view(), "a fault now would lose everything"),
                (ended(marked_view(), status="lost"), "It ended without a checkpoint, after 1,240 steps"),
                (view_of(smoke_events(12)), "A smoke keeps no checkpoints."),
            ):
                pane.show(view)
                await pilot.pause()
                assert text in shown(app)

    asyncio.run(scenario())
