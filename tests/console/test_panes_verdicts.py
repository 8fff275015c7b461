"""The falsifiers' pane: the worst first, expected and observed of a FAIL always, everything of the chosen one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgspec
import pytest
from rich.cells import cell_len
from textual.pilot import Pilot

from console.run_state import RunState
from console.view import Link, View
from console.widgets.verdicts import Verdicts, verdict_rows
from tests.console.desk_app import shown
from tests.console.pane_views import HOSTILE, SHAPES, Host, train_events, verdict, view_of

JUDGED = (
    verdict("F-PASS-001", "PASS", claim="the first claim", observed="0.1", severity="fatal"),
    verdict("F-SPIKE-001", "FAIL", claim="no spike", expected="< 3x median", observed="5.1x", step=9_204),
    verdict("F-PENDING-001", "PENDING", claim="held-out falls", observed="nothing yet", severity="warn", step=0),
    verdict("F-PASS-002", "PASS", claim="another claim"),
    verdict("F-UNKNOWN-001", "UNKNOWN", claim="enough data", observed="missing: eval.loss"),
)


def view(judged: tuple[object, ...] = JUDGED, **state: object) -> View:
    stated = {v.id: v for v in judged}  # type: ignore[attr-defined]
    known = RunState(judged=judged, stated=stated, events=9, last_t=100.0, first_t=1.0, **state)  # type: ignore[arg-type]
    return View(state=known, link=Link(status="running", heard=100.0), now=100.0)


def lines(shown_view: View, width: int = 100, **what: str) -> list[str]:
    return [row.plain.rstrip() for row, _ in verdict_rows(shown_view, width, **what)]


def test_the_worst_comes_first_and_a_fail_always_tells_what_was_seen() -> None:
    told = lines(view())
    assert [line.split()[:3] for line in told if line.startswith("  ") and not line.startswith("    ")] == [
        ["✘", "FAIL", "F-SPIKE-001"],
        ["?", "UNKNOWN", "F-UNKNOWN-001"],
        ["◌", "PENDING", "F-PENDING-001"],
        ["✔", "PASS", "F-PASS-001"],
        ["✔", "PASS", "F-PASS-002"],
    ]
    assert told[1:3] == ["    expected  < 3x median", "    observed  5.1x at step 9,204"]
    assert sum("expected" in line for line in told) == 1


def test_severity_and_claim_are_told_where_there_is_room() -> None:
    assert lines(view())[0].split()[3:] == ["gate", "no", "spike"]
    assert lines(view(), 34)[0].split()[2:] == ["F-SPIKE-001", "gate"]
    assert lines(view(), 18)[0] == "  ✘ FAIL  F-SPIKE…"


def test_severities_stand_in_one_column_in_a_narrow_pane_too() -> None:
    told = [line for line in lines(view(), 44) if line.startswith("  ") and not line.startswith("    ")]
    assert {line.index(line.split()[-1]) for line in told} == {39}


@pytest.mark.parametrize(
    ("width", "counts"),
    [
        (80, "✘ 1 FAIL  ? 1 UNKNOWN  ◌ 1 PENDING  ✔ 2 PASS"),
        (52, "✘ 1 FAIL  ? 1 UNKNOWN  ◌ 1  ✔ 2"),
        (34, "✘ 1 FAIL  ?"),
    ],
)
def test_where_the_frame_is_short_the_worst_counts_keep_their_words(width: int, counts: str) -> None:
    async def scenario() -> None:
        pane = Verdicts()
        app = Host(pane)
        async with app.run_test(size=(width, 12)) as pilot:
            pane.show(view())
            await pilot.pause()
            assert f"Falsifiers  {counts}" in shown(app).splitlines()[0]

    asyncio.run(scenario())


def test_the_verdict_under_the_cursor_tells_what_was_seen_and_the_opened_one_everything() -> None:
    pointed = lines(view(), pointed="F-UNKNOWN-001")
    assert pointed[3].startswith("▸ ? UNKNOWN")
    assert pointed[5] == "    observed  missing: eval.loss at step 7"
    opened = lines(view(), opened="F-SPIKE-001")
    assert "    claim     no spike" in opened
    assert "    severity  gate: a FAIL forbids promotion" in opened


def test_the_opened_verdict_tells_how_it_came_about() -> None:
    changes = tuple(
        msgspec.structs.replace(JUDGED[1], verdict=word, t=t, step=step, observed=seen)
        for word, t, step, seen in (("PASS", 50.0, 100, "2.9x"), ("FAIL", 90.0, 9_204, "5.1x"))
    )
    told = "\n".join(lines(view(history=changes), opened="F-SPIKE-001"))
    assert "step 100  became ✔ PASS: 2.9x" in told
    assert "step 9,204  became ✘ FAIL: 5.1x" in told


def test_only_the_last_changes_of_a_verdict_that_wavers_are_listed() -> None:
    changes = tuple(msgspec.structs.replace(JUDGED[1], step=step) for step in range(1, 5_001))
    told = lines(view(history=changes), opened="F-SPIKE-001")
    assert "    4,980 earlier changes" in told
    assert sum("became" in line for line in told) == 20


@pytest.mark.parametrize("width", [120, 40])
def test_a_disagreement_is_the_first_and_loudest_line(width: int) -> None:
    doctored = view()
    doctored.state.stated["F-SPIKE-001"] = msgspec.structs.replace(JUDGED[1], verdict="PASS")
    ended = replace(doctored, link=replace(doctored.link, status="ended", live=False))
    rows = verdict_rows(ended, width, opened="F-SPIKE-001")
    text = " ".join("".join(row.plain for row, _ in rows).split())
    assert text.startswith("≠ ENGINE AND CONSOLE DISAGREE: F-SPIKE-001: the engine says PASS, the stream says FAIL")
    assert "reverse" in str(rows[0][0].spans[0].style)
    assert "engine PASS: observed 5.1x" in text


def test_before_the_run_has_told_what_it_is_nothing_is_judged() -> None:
    assert lines(View(), 40)[0].startswith("Nothing is judged yet")


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("width", [120, 44, 20, 5])
def test_hostile_texts_stay_texts_and_in_their_lines(hostile: str, width: int) -> None:
    judged = (verdict("F-X-001", "FAIL", claim=hostile, expected=hostile, observed=hostile, severity=hostile),)
    rows = verdict_rows(view(judged), width, pointed="F-X-001", opened="F-X-001")
    assert all(cell_len(row.plain) <= width for row, _ in rows)
    if len(hostile) < 20 and width == 120:
        assert f"observed  {hostile} at step 7" in "\n".join(row.plain for row, _ in rows)


async def showing(pilot: Pilot[None], pane: Verdicts, what: View) -> None:
    pane.show(what)
    await pilot.pause()


def test_keys_move_the_cursor_and_open_and_the_cursor_stays_on_its_verdict() -> None:
    async def scenario() -> None:
        pane = Verdicts()
        app = Host(pane)
        async with app.run_test(size=(80, 24)) as pilot:
            await showing(pilot, pane, view())
            await pilot.press("down", "down")
            assert "▸ ◌ PENDING" in shown(app)
            await pilot.press("enter")
            assert "severity  warn: a FAIL is only told" in shown(app)
            # Another verdict fails: it goes to the top, and the cursor stays where it was.
            worse = tuple(msgspec.structs.replace(v, verdict="FAIL") if v.id == "F-PASS-001" else v for v in JUDGED)
            await showing(pilot, pane, view(worse))
            assert "▸ ◌ PENDING" in shown(app)
            await pilot.press("enter")
            assert "severity" not in shown(app)
            await pilot.press("end")
            assert "▸ ✔ PASS     F-PASS-002" in shown(app)
            await pilot.press("home")
            assert "▸ ✘ FAIL     F-PASS-001" in shown(app)

    asyncio.run(scenario())


def test_a_click_chooses_and_a_second_one_opens() -> None:
    async def scenario() -> None:
        pane = Verdicts()
        app = Host(pane)
        async with app.run_test(size=(80, 24)) as pilot:
            await showing(pilot, pane, view())
            row = next(i for i, line in enumerate(shown(app).splitlines()) if "F-PENDING-001" in line)
            await pilot.click(pane, offset=(20, row))
            assert "▸ ◌ PENDING" in shown(app)
            row = next(i for i, line in enumerate(shown(app).splitlines()) if "F-PENDING-001" in line)
            await pilot.click(pane, offset=(20, row))
            assert "severity  warn" in shown(app)

    asyncio.run(scenario())


def test_the_cursor_is_kept_in_sight_in_a_low_pane() -> None:
    async def scenario() -> None:
        pane = Verdicts()
        app = Host(pane)
        async with app.run_test(size=(44, 7)) as pilot:
            await showing(pilot, pane, view_of(train_events(30)))
            for _ in range(9):
                await pilot.press("down")
                assert "▸" in shown(app).split("\n", 1)[1]
                assert "observed" in shown(app)
            for _ in range(9):
                await pilot.press("up")
                assert "▸" in shown(app).split("\n", 1)[1]

    asyncio.run(scenario())


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_it_shows_what_it_can_in_any_shape(width: int, height: int) -> None:
    async def scenario() -> None:
        pane = Verdicts()
        app = Host(pane)
        async with app.run_test(size=(width, height)) as pilot:
            await showing(pilot, pane, view())
            await pilot.press("enter")
            assert "Falsifiers" in shown(app)
            assert "✘ FAIL" in shown(app).split("\n", 1)[1]
            await pilot.resize_terminal(12, 3)
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            assert "✘ FAIL" in shown(app).split("\n", 1)[1]
            assert "F-SPIKE-001" in pane.copy_text()
            assert "5.1x at step 9,204" in " ".join(pane.copy_text().split())

    asyncio.run(scenario())


def test_an_unchanged_list_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        pane = Verdicts()
        app = Host(pane)
        async with app.run_test(size=(80, 24)) as pilot:
            await showing(pilot, pane, view())
            drawn: list[object] = []
            monkeypatch.setattr(pane, "redraw", lambda: drawn.append(1))
            pane.show(replace(view(), now=200.0))
            assert drawn == []
            pane.show(view(JUDGED[:2]))
            assert drawn

    asyncio.run(scenario())
