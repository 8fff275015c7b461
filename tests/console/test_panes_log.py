"""The log: follows, keeps still for a reader, filters and finds; five thousand lines cost what is in sight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from console.run_state import MAX_LOG_LINES, LogLine, RunState
from console.view import Link, View
from console.widgets.log import MAX_COPY, LogPane
from console.widgets.log_lines import MAX_ROWS, LogLines, pieces, rows_of
from tests.console.desk_app import shown
from tests.console.pane_views import HOSTILE, SHAPES, Host
from tests.streams import EPOCH


@pytest.fixture(autouse=True)
def _in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def said(*texts: str, level: str = "info", first: int = 0) -> list[LogLine]:
    return [LogLine(EPOCH + number, level, text) for number, text in enumerate(texts, first)]


def numbers(count: int, first: int = 0) -> list[LogLine]:
    return said(*(f"line {number:05d}" for number in range(first, first + count)), first=first)


def view(lines: Sequence[LogLine]) -> View:
    return View(state=RunState(log=tuple(lines), events=len(lines)))


# Lines


def test_new_lines_are_told_from_old_ones_by_what_they_are() -> None:
    lines = LogLines()
    log = numbers(10)
    assert lines.update(log).replaced
    assert lines.update(tuple(log)).nothing
    assert lines.update([*log, *numbers(3, 10)]).new == 3
    log = [*lines_of(lines)[5:], *numbers(4, 13)]
    change = lines.update(log)
    assert (change.gone, change.new, change.replaced) == (5, 4, False)
    assert lines_of(lines) == log
    assert lines.update(log[:3]).replaced  # an earlier moment
    assert lines.update([]).replaced
    assert lines.update([]).nothing


def test_another_run_whose_lines_look_alike_is_another_log() -> None:
    lines = LogLines()
    lines.update(numbers(5))
    assert lines.update(numbers(6)).replaced


def lines_of(lines: LogLines) -> list[LogLine]:
    return [lines[number] for number in lines.shown]


texts = st.lists(st.sampled_from(["loss", "LOSS 2", "step", "漢字漢字", "x" * 30, ""]), max_size=12)


@settings(max_examples=150, deadline=None)
@given(texts, st.lists(st.tuples(texts, st.integers(0, 5)), max_size=6), st.sampled_from(["", "los", "zzz"]))
def test_lines_that_came_bit_by_bit_are_those_that_came_at_once(
    first: list[str], more: list[tuple[list[str], int]], wanted: str
) -> None:
    gradual, at_once = LogLines(), LogLines()
    for lines in (gradual, at_once):
        lines.filter, lines.width = wanted, 7
    log = said(*first)
    gradual.update(log)
    for added, gone in more:
        log = [*log[gone:], *said(*added)]
        gradual.update(log)
    at_once.update(log)
    assert lines_of(gradual) == lines_of(at_once)
    assert gradual.rows == at_once.rows
    rows = [gradual.at(row) for row in range(gradual.rows)]
    assert [gradual[number] for number, _ in rows] == [at_once[at_once.at(r)[0]] for r in range(at_once.rows)]
    assert [gradual.row_of(number) for number in gradual.shown] == [i for i, (_, part) in enumerate(rows) if part == 0]


@given(st.sampled_from(HOSTILE) | st.text(max_size=90), st.integers(2, 40))
def test_a_line_is_cut_into_rows_that_fit_and_miss_nothing(text: str, width: int) -> None:
    cuts = pieces(text, width)
    assert "".join(text[start:end] for start, end in cuts) == text[: cuts[-1][1]]
    assert all(cell_len(text[start:end]) <= width for start, end in cuts)
    assert cuts[-1][1] == len(text) or len(cuts) >= MAX_ROWS
    assert rows_of(text, width) == min(MAX_ROWS, max(1, len(cuts)))


# The pane

LONG = "expected " + "metric <= 0, " * 20 + "the end"


async def show(pane: LogPane, lines: Sequence[LogLine], pilot: object) -> None:
    pane.show(view(lines))
    await pilot.pause()  # type: ignore[attr-defined]


def scene(size: tuple[int, int] = (80, 12)) -> tuple[Host, LogPane]:
    pane = LogPane()
    return Host(pane), pane


def title(app: Host) -> str:
    return shown(app).splitlines()[0]


def in_sight(app: Host) -> list[str]:
    """The lines, without the frame and the scroll bar."""
    return [line[:-3] for line in shown(app).splitlines()[1:-1]]


def test_it_follows_what_arrives() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            log = numbers(100)
            await show(pane, log, pilot)
            assert "line 00099" in shown(app)
            assert "following" in title(app)
            log = [*log, *numbers(50, 100)]
            await show(pane, log, pilot)
            assert "line 00149" in shown(app)
            assert "line 00099" not in shown(app)
            await pilot.resize_terminal(60, 7)
            await pilot.pause()
            assert "line 00149" in shown(app)

    asyncio.run(scenario())


def test_scrolling_up_stops_following_and_tells_what_is_missed() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            log = numbers(100)
            await show(pane, log, pilot)
            pane.scroll_up(animate=False)
            await pilot.pause()
            assert "paused" in title(app)
            before = in_sight(app)
            await show(pane, [*log, *numbers(12, 100)], pilot)
            assert in_sight(app) == before
            assert "paused · 12 new" in title(app)
            await pilot.press("end")
            assert "following" in title(app)
            assert "line 00111" in shown(app)

    asyncio.run(scenario())


def test_following_is_switched_by_the_key_and_resumed_at_the_end() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            log = numbers(100)
            await show(pane, log, pilot)
            pane.toggle_follow()
            await show(pane, [*log, *numbers(5, 100)], pilot)
            assert not pane.following
            assert "line 00104" not in shown(app)
            pane.toggle_follow()
            await pilot.pause()
            assert "line 00104" in shown(app)
            pane.scroll_home(animate=False)
            await pilot.pause()
            assert not pane.following
            pane.scroll_end(animate=False)
            await pilot.pause()
            assert pane.following

    asyncio.run(scenario())


def test_what_is_read_stays_while_old_lines_go() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            log = numbers(MAX_LOG_LINES)
            await show(pane, log, pilot)
            pane.scroll_to(y=3_000, animate=False, immediate=True)
            await pilot.pause()
            before = in_sight(app)
            assert "line 03000" in before[0]
            log = [*log[700:], *numbers(700, MAX_LOG_LINES)]
            await show(pane, log, pilot)
            assert in_sight(app) == before

    asyncio.run(scenario())


def test_a_filter_persists_and_is_always_seen() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            log = said("Loss 2.1", "a step", "the LOSS again", "[loss] as text")
            await show(pane, log, pilot)
            pane.set_filter("lOsS")
            await pilot.pause()
            assert 'filter "lOsS" 3 of 4' in title(app)
            assert "a step" not in shown(app)
            log = [*log, *said("no", "loss")]
            await show(pane, log, pilot)
            assert 'filter "lOsS" 4 of 6' in title(app)
            assert pane.filter_text == "lOsS"
            pane.set_filter("[loss]")
            await pilot.pause()
            assert "[loss] as text" in shown(app)
            assert 'filter "[loss]" 1 of 6' in title(app)
            pane.set_filter("zzz")
            await pilot.pause()
            assert 'filter "zzz" 0 of 6' in title(app)
            pane.set_filter("")
            await pilot.pause()
            assert "filter" not in title(app)
            assert "a step" in shown(app)

    asyncio.run(scenario())


def test_a_filter_keeps_the_readers_place() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            await show(pane, numbers(1_000), pilot)
            pane.scroll_to(y=500, animate=False, immediate=True)
            await pilot.pause()
            pane.set_filter("5")
            await pilot.pause()
            assert "line 00500" in shown(app)
            pane.set_filter("")
            await pilot.pause()
            assert "line 00500" in shown(app)

    asyncio.run(scenario())


def test_a_search_goes_from_match_to_match_and_round() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            log = said(*("needle here" if number % 40 == 7 else "hay" for number in range(100)))
            await show(pane, log, pilot)
            pane.set_search("NEEDLE")
            pane.next_match(-1)
            await pilot.pause()
            assert 'search "NEEDLE" 3 of 3' in title(app)
            assert "▸ needle here" in shown(app)
            assert not pane.following
            for place in (2, 1, 3):
                pane.next_match(-1)
                await pilot.pause()
                assert f"{place} of 3" in title(app)
                assert "▸ needle here" in shown(app)
            pane.next_match(1)
            await pilot.pause()
            assert "1 of 3" in title(app)
            pane.set_search("nowhere")
            pane.next_match(1)
            await pilot.pause()
            assert 'search "nowhere" 0' in title(app)

    asyncio.run(scenario())


def test_hits_are_highlighted_in_every_row_that_they_reach_into() -> None:
    pane = LogPane()

    async def scenario() -> None:
        app = Host(pane)
        async with app.run_test(size=(30, 12)) as pilot:
            await show(pane, said("aaaa " * 8 + "needle" + " bbbb" * 8), pilot)
            pane.set_search("needle")
            marked = [
                pane.line(y).plain[span.start : span.end]
                for y in range(pane.lines_in_all())
                for span in pane.line(y).spans
                if "reverse" in str(span.style)
            ]
            assert "".join(marked) == "needle"

    asyncio.run(scenario())


def test_a_long_line_takes_one_row_until_it_is_unfolded() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            pane.focus()
            await show(pane, [*numbers(20), *said(LONG, "after")], pilot)
            first, second = in_sight(app)[-2:]
            assert first.endswith("…")
            assert "· expected metric <= 0" in first
            assert "after" in second
            assert "enter: whole lines" in title(app)
            await pilot.press("enter")
            await pilot.pause()
            assert "the end" in shown(app)
            assert "after" in in_sight(app)[-1]  # the newest line stays in sight
            assert all(line.startswith("│ " + " " * 12) for line in in_sight(app)[-4:-1])
            await pilot.press("enter")
            await pilot.pause()
            assert "the end" not in shown(app)

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["filter", "search"])
def test_what_was_found_at_the_end_of_a_long_line_is_seen(how: str) -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            await show(pane, [*numbers(3), *said(LONG)], pilot)
            assert "the end" not in shown(app)
            change = pane.set_filter if how == "filter" else pane.set_search
            change("the end")
            await pilot.pause()
            assert "the end" in "\n".join(in_sight(app))
            change("")
            await pilot.pause()
            assert "the end" not in shown(app)

    asyncio.run(scenario())


def test_unfolding_keeps_the_readers_place() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            pane.focus()
            await show(pane, said(*(f"{n:04d} {LONG}" for n in range(200))), pilot)
            pane.scroll_to(y=100, animate=False, immediate=True)
            await pilot.pause()
            for _ in range(2):
                await pilot.press("enter")
                await pilot.pause()
                assert "0100 expected" in in_sight(app)[0]

    asyncio.run(scenario())


def test_a_run_that_is_over_is_not_followed() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            pane.show(replace(view(numbers(5)), link=Link(status="ended", live=False)))
            await pilot.pause()
            assert "following" not in title(app)

    asyncio.run(scenario())


def test_levels_are_told_by_a_shape_and_times_by_the_local_clock() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            log = [*said("fine"), *said("look", level="warning"), *said("bad", level="error"), *said("?", level="[b]")]
            await show(pane, log, pilot)
            told = [line.strip("│ ").rstrip("│ ") for line in shown(app).splitlines()[1:5]]
            assert [line.split(maxsplit=1)[1] for line in told] == ["· fine", "⚠ look", "✘ bad", "? ?"]
            assert told[0].startswith("08:53:20  ")
            await pilot.resize_terminal(40, 12)
            await pilot.pause()
            assert "08:53:20" not in shown(app)
            assert "✘ bad" in shown(app)

    asyncio.run(scenario())


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("width", [30, 80])
def test_hostile_texts_stay_texts(hostile: str, width: int) -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(width, 20)) as pilot:
            await show(pane, said("before", hostile, "after"), pilot)
            assert all(cell_len(line) <= width for line in shown(app).splitlines())
            if 0 < cell_len(hostile) < 20:
                assert hostile in shown(app)
            pane.set_filter(hostile)
            pane.set_search(hostile)
            await pilot.pause()
            assert "after" not in shown(app)
            assert 'filter "' in title(app)

    asyncio.run(scenario())


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_it_shows_what_it_can_in_any_shape(width: int, height: int) -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(width, height)) as pilot:
            await show(pane, numbers(200), pilot)
            assert "line 00199" in shown(app)
            await pilot.resize_terminal(4, 3)
            await pilot.pause()
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            assert "line 00199" in shown(app)

    asyncio.run(scenario())


def test_only_rows_in_sight_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            log = numbers(MAX_LOG_LINES)
            await show(pane, log, pilot)
            drawn: list[int] = []
            line = pane.line
            monkeypatch.setattr(pane, "line", lambda y: drawn.append(y) or line(y))
            await show(pane, [*log[1:], *numbers(1, MAX_LOG_LINES)], pilot)
            assert 0 < len(drawn) <= 40
            drawn.clear()
            await show(pane, [*log[1:], *numbers(1, MAX_LOG_LINES)][:0] or log[:0], pilot)
            pane.show(view([]))
            assert drawn == []

    asyncio.run(scenario())


# Out of here


def test_a_copy_has_the_lines_in_sight_or_all_filtered_ones() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            await show(pane, numbers(100), pilot)
            assert pane.copy_text().splitlines() == [
                f"{time.strftime('%H:%M:%S', time.localtime(EPOCH + n))}  info     line {n:05d}" for n in range(90, 100)
            ]
            pane.set_filter("7")
            assert [line[-10:] for line in pane.copy_text().splitlines()] == [
                f"line {n:05d}" for n in range(100) if "7" in f"{n:05d}"
            ]
            pane.set_filter("zzz")
            assert pane.copy_text() == ""

    asyncio.run(scenario())


def test_a_copy_that_is_too_much_leaves_the_oldest_lines_out_and_says_so() -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            await show(pane, said(*(f"{n} " + "x" * 500 for n in range(1_000))), pilot)
            pane.set_filter("x")
            first, *rest = pane.copy_text().splitlines()
            assert first == f"… {1_000 - len(rest):,} earlier lines are left out"
            assert " 999 xxx" in rest[-1]
            assert len("\n".join(rest)) <= MAX_COPY

    asyncio.run(scenario())


def test_a_saved_file_has_every_line_that_passes_the_filter_and_overwrites_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        app, pane = scene()
        async with app.run_test(size=(80, 12)) as pilot:
            await show(pane, said("loss 1", "step 漢字", "loss 2"), pilot)
            assert pane.save(tmp_path / "all.txt") == 3
            assert "step 漢字\n" in (tmp_path / "all.txt").read_text(encoding="utf-8")
            pane.set_filter("loss")
            assert pane.save(tmp_path / "some.txt") == 2
            assert [line[-6:] for line in (tmp_path / "some.txt").read_text().splitlines()] == ["loss 1", "loss 2"]
            with pytest.raises(FileExistsError):
                pane.save(tmp_path / "some.txt")

    asyncio.run(scenario())
