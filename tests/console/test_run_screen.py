"""The Run screen in the whole app: every key, every kind of run, what is told, and what is never done."""

from __future__ import annotations

import asyncio
import base64
import csv
import json
import math
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from textual.drivers.headless_driver import HeadlessDriver
from textual.pilot import Pilot
from textual.widget import Widget
from textual.widgets import Input

from console.app import KdConsoleApp
from console.replay import SCRUBS
from console.screens.confirm import ConfirmScreen
from console.screens.home import HomeScreen
from console.screens.run import RunScreen
from console.settings import Settings
from console.widgets.log import LogPane
from dispatch import runs
from dispatch.transport import LocalTransport
from engine.config import load_config
from engine.falsifiers import builtin_contract
from engine.stream import Event
from tests.console.app_rig import MIDDLE, NARROW, NOW, frozen, in_app, listed, opened, said
from tests.console.desk_app import shown, until
from tests.console.run_dirs import (
    READY,
    append,
    closing,
    ending,
    good_train,
    live_run,
    make_run,
    opening,
    shifted,
    steps_between,
    train_contract,
    train_step,
)
from tests.console_rig import processes_of
from tests.streams import stamped, with_verdicts

Shown = Callable[[KdConsoleApp, Pilot[Any], RunScreen], Awaitable[None]]
PANES = ("chart", "verdicts", "checkpoints", "projection", "vitals", "log")

TRAINER = """
import json, os, signal, sys, time
run = json.load(open('dispatch.json'))['run']
def emit(seq, **fields):
    line = dict(v=1, run=run, seq=seq, t=time.time(), **fields)
    with open('events.jsonl', 'a') as file:
        file.write(json.dumps(line) + chr(10))
def stop(*_):
    emit(1, event='log', level='info', message='committed')
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
emit(0, event='log', level='info', message='here')
time.sleep(600)
"""
"""What a trainer does as far as stopping it goes; a real one takes seconds to import."""


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with frozen(monkeypatch):
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run of 200 steps that passed."""
    return good_train(tmp_path_factory.mktemp("run") / "evidence")


def on_run(path: Path, body: Shown, **options: Any) -> KdConsoleApp:
    """Opens a run in the app and does something there once it is read."""

    async def go(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = app.screen
        assert isinstance(screen, RunScreen)
        await body(app, pilot, screen)

    return in_app(go, path.parent, run=path, **options)


def focused(screen: RunScreen) -> str | None:
    return screen.focused.id if screen.focused else None


def _fills(pane: Widget, rows: int) -> bool:
    return pane.region.height == rows - 1


def followed(screen: RunScreen) -> tuple[bool, bool]:
    """Whether chart and log go along with what arrives."""
    return screen.chart.sight.following, screen.query_one(LogPane).following


def step_of(screen: RunScreen) -> int:
    """The last step of what is shown; 0 before the first."""
    last = screen.view.state.last_step
    return last.step if last else 0


def seen(screen: RunScreen) -> list[str]:
    """The panes that stand on the screen."""
    return [name for name in PANES if screen.query_one(f"#{name}").region.area]


# Panes


def test_digits_and_tab_go_to_each_pane_and_round(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        assert focused(screen) == "chart"
        for key, name in zip("234561", (*PANES[1:], "chart"), strict=True):
            await pilot.press(key)
            assert focused(screen) == name
        for name in (*PANES[1:], "chart"):
            await pilot.press("tab")
            assert focused(screen) == name
        for name in reversed(PANES):
            await pilot.press("shift+tab")
            assert focused(screen) == name
        assert seen(screen) == list(PANES)

    on_run(good, body)


@pytest.mark.parametrize("size", [NARROW, MIDDLE])
def test_a_small_screen_shows_one_pane_and_the_digits_change_it(good: Path, size: tuple[int, int]) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        for key, name in zip("23456", PANES[1:], strict=True):
            await pilot.press(key)
            await pilot.pause()
            assert seen(screen) == [name]
            region = screen.query_one(f"#{name}").region
            assert (region.x, region.width, region.bottom) == (0, size[0], size[1] - 1), "not all of the room"
        await pilot.resize_terminal(120, 40)
        await until(pilot, lambda: seen(screen) == list(PANES), "all panes once there is room")
        await pilot.resize_terminal(*size)
        await until(pilot, lambda: seen(screen) == ["log"], "the pane with the focus is the one that stays")

    on_run(good, body, size=size)


@pytest.mark.parametrize("size", [(120, 40), NARROW])
def test_z_gives_the_whole_screen_to_a_pane_whichever_one_goes_to(good: Path, size: tuple[int, int]) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        before = shown(app)
        await pilot.press("z")
        for key, name in [("", "chart"), *zip("23456", PANES[1:], strict=True)]:
            if key:
                await pilot.press(key)
            pane = screen.query_one(f"#{name}")
            await until(pilot, partial(_fills, pane, size[1]), f"{name} fills it")
            assert focused(screen) == name
            assert "? help" in shown(app).splitlines()[-1], "how to get out must be seen"
        await pilot.press("slash", *"export")
        await until(pilot, lambda: "phase export" in shown(app), "the filter works there too")
        assert screen.query_one("#ask").region.area
        await pilot.press("enter", "1", "z")
        await until(pilot, lambda: shown(app).splitlines()[:6] == before.splitlines()[:6], "all is as before")
        await pilot.press("z", "escape")
        await until(pilot, lambda: screen.maximized is None, "escape leaves it too")
        assert app.screen is screen

    on_run(good, body, size=size)


def test_escape_goes_back_to_the_list_and_a_run_can_be_opened_from_there(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press("escape")
        await listed(app, pilot)
        assert isinstance(app.screen, HomeScreen)
        assert screen not in app.screen_stack
        await pilot.press("enter")
        assert (await opened(app, pilot)).run_dir.path == good
        assert "200 / 200" in shown(app)

    on_run(good, body)


# Chart


def test_every_key_of_the_chart_changes_what_is_seen(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        chart = screen.chart
        first = shown(app)

        async def press(*keys: str) -> str:
            await pilot.press(*keys)
            await pilot.pause()
            return str(chart.border_title)

        assert "log y · EMA 0.90 · x: step" in first
        assert "linear y" in await press("l")
        assert "wall time" in await press("x")
        assert "EMA 0.95" in await press("plus")
        assert "EMA 0.98" in await press("equals_sign")
        assert "EMA 0.95" in await press("minus")
        assert "zoomed" in await press("i")
        narrow = chart.sight.look.window
        assert narrow is not None
        await press("i")
        closer = chart.sight.look.window
        assert closer is not None
        assert closer[1] - closer[0] < narrow[1] - narrow[0]
        await press("o")
        assert chart.sight.look.window == pytest.approx(narrow)
        await press("0")
        await until(pilot, lambda: shown(app) == first, "0 gives back the first picture")
        for key in ("p", "1"):
            assert "Agreement with the teacher" in await press(key)
            assert "agreement" in shown(app).lower().partition("\n")[2], "its legend"
            assert "Loss" in await press(key)
        await press("2")
        assert "Loss" in await press("1"), "from another pane 1 goes to the chart and turns no page"

    on_run(good, body)


def test_the_cursor_tells_the_values_of_a_step_and_copies_of_the_chart_have_them(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press("left")
        await until(pilot, lambda: "step 200" in shown(app), "the last step")
        await pilot.press("y")
        assert "step 200" in app.clipboard
        assert said(app) == [f"copied {len(app.clipboard.splitlines())} lines of loss"]

    on_run(good, body)


def test_f_lets_the_chart_stay_where_it_is_or_go_along(tmp_path: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        assert followed(screen) == (True, True)
        for keys, expected in (("f", (False, True)), ("f", (True, True)), ("6f", (True, False))):
            await pilot.press(*keys)
            assert followed(screen) == expected
        assert "paused" in shown(app)
        await pilot.press("f")
        assert followed(screen) == (True, True)

    on_run(live_run(tmp_path, last_t=NOW - 1), body)


# Time


def test_brackets_go_through_the_past_and_back_to_the_present(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        present = shown(app)
        assert "COMPLETED" in present
        await pilot.press(*["left_square_bracket"] * 10)
        await pilot.pause()
        past = screen.view
        assert past.scrubbed
        assert "as of" in shown(app)
        assert "COMPLETED" not in shown(app).splitlines()[0]
        step = step_of(screen)
        assert 0 < step < 200
        assert len(past.state.steps) == step
        assert all(line.t <= past.now for line in past.state.log)
        await pilot.press("right_square_bracket")
        assert step_of(screen) > step
        for _ in range(SCRUBS):
            await screen.run_action("scrub_back")
        assert step_of(screen) == 0, "before the first step"
        for _ in range(SCRUBS + 1):
            await screen.run_action("scrub_forward")
        assert not screen.view.scrubbed
        await until(pilot, lambda: shown(app) == present, "the present again")
        await pilot.press("left_square_bracket", "0")
        await until(pilot, lambda: shown(app) == present, "0 leads to the present, too")

    on_run(good, body)


def test_the_past_stays_the_past_while_the_run_goes_on(tmp_path: Path) -> None:
    path = live_run(tmp_path, steps=60, last_t=NOW - 30)

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press(*["left_square_bracket"] * 5)
        moment = screen.view.now
        events = screen.latest.state.events
        append(path, go_on(screen, 61, 80))
        await until(pilot, lambda: screen.latest.state.events > events, "what was appended")
        assert screen.view.now == moment
        assert step_of(screen) < 60
        await pilot.press("0")
        assert step_of(screen) == 80

    on_run(path, body)


def go_on(screen: RunScreen, first: int, last: int, loss: Callable[[int], float] | None = None) -> list[Event]:
    """More steps of a run that goes on, from a second after its last event on."""
    state = screen.latest.state
    made: list[Event] = (
        steps_between(first, last) if loss is None else [*(train_step(s, loss(s)) for s in range(first, last + 1))]
    )
    return numbered(stamped(made, start=state.last_t + 1.0, apart=0.1), state.events)


def numbered(events: list[Event], first: int) -> list[Event]:
    return [msgspec.structs.replace(event, seq=first + number) for number, event in enumerate(events)]


# Log


def test_a_filter_narrows_the_log_while_one_types_and_stays(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press("slash")
        box = screen.query_one("#ask", Input)
        assert box.has_focus
        assert "empty shows all" in shown(app)
        await pilot.press(*"PHASE ")
        log = screen.query_one(LogPane)
        assert log.filter_text == "PHASE "
        await pilot.press("enter")
        assert focused(screen) == "log"
        assert not box.display
        await pilot.pause()
        lines = log.all_text().splitlines()
        assert lines
        assert all("phase " in line for line in lines)
        await pilot.press("slash")
        assert box.value == "PHASE ", "what was asked for is offered again"
        await pilot.press("backspace", "enter")
        assert log.filter_text == ""
        assert len(log.all_text().splitlines()) > len(lines)
        await pilot.press("slash", "x", "escape")
        assert focused(screen) == "log"
        assert app.screen is screen, "escape leaves the question, not the run"

    on_run(good, body, size=MIDDLE)


def test_a_search_goes_to_the_next_and_the_previous_line_with_it(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        def title() -> str:
            return str(screen.query_one(LogPane).border_title)

        await pilot.press("ctrl+f")
        assert "look for this text" in shown(app)
        await pilot.press(*"checkpoint", "enter")
        total = len([1 for line in screen.query_one(LogPane).all_text().splitlines() if "checkpoint" in line])
        assert total > 1
        await pilot.press("n")
        first = title()
        assert f"of {total}" in first
        await pilot.press("n")
        assert title() != first
        await pilot.press("N")
        assert title() == first
        assert "paused" in title(), "what was found stays in sight"

    on_run(good, body, size=MIDDLE)


# Out of here


def test_y_copies_what_each_pane_shows(good: Path) -> None:
    expected = {"1": "━ total", "2": "F-FINITE-001", "3": "final", "4": "took", "5": "GPU", "6": "COMPLETED"}

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        for key, text in expected.items():
            await pilot.press("2" if key == "1" else "3", key, "y")
            assert text in app.clipboard
            assert "\x1b" not in app.clipboard
        assert len(said(app)) == len(expected)

    on_run(good, body)


def test_e_writes_data_and_picture_of_the_chart_beside_what_is_there(good: Path, tmp_path: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press("e", "e")
        stem = f"{good.name}-chart"
        names = {f"{stem}.csv", f"{stem}.svg", f"{stem}-2.csv", f"{stem}-2.svg"}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert said(app)[0] == f"written: {tmp_path}/{stem}.csv, {tmp_path}/{stem}.svg"
        rows = list(csv.reader((tmp_path / f"{stem}.csv").open()))
        assert {"step", "loss"} & set(rows[0]), rows[0]
        assert len(rows) > 200
        assert ElementTree.parse(tmp_path / f"{stem}.svg").getroot().tag.endswith("svg")

    on_run(good, body)


def test_an_id_that_is_a_path_leads_nowhere(tmp_path: Path) -> None:
    path = good_train(tmp_path / "evidence")
    manifest = json.loads((path / "dispatch.json").read_text())
    (path / "dispatch.json").write_text(json.dumps(manifest | {"id": "evidence/away"}))

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press("2", "e")
        assert [found.name for found in tmp_path.iterdir() if found.is_file()] == [f"{path.name}-verdicts.txt"]

    on_run(path, body)


@pytest.mark.parametrize(("key", "name"), [("2", "verdicts"), ("3", "checkpoints"), ("6", "log")])
def test_e_writes_what_another_pane_says_as_text(good: Path, tmp_path: Path, key: str, name: str) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press(key, "e")
        [path] = tmp_path.iterdir()
        assert path.name == f"{good.name}-{name}.txt"
        assert path.read_text().strip()
        assert path.stat().st_mode & 0o077 == 0

    on_run(good, body)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="needs a place that takes no file")
def test_a_place_that_takes_no_file_is_told(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")  # takes none from anybody

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press("e")
        assert [text.partition(":")[0] for text in said(app)] == ["not written"]

    on_run(good, body)


# Stopping


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Path]:
    """A run that a supervisor watches over, as on a host."""
    config = load_config(None, template="builtin")
    made = runs.create_run(config, evidence=tmp_path / "evidence", contract_text=builtin_contract("smoke"))
    asyncio.run(runs.launch(LocalTransport(), made.path, command=(sys.executable, "-c", TRAINER)))
    yield made.path
    asyncio.run(runs.stop(LocalTransport(), made.path, grace=0.1))


def test_s_stops_the_run_after_a_question_and_says_how_it_ended(trainer: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        for answer in ("n", "escape", "enter"):
            await pilot.press("s")
            await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "the question")
            asked = shown(app)
            assert f"Stop {trainer.name}?" in " ".join(asked.split())
            assert "checkpoint" in asked
            await pilot.press(answer)
            await until(pilot, lambda: app.screen is screen, "the run again")
        assert processes_of(trainer), "it was stopped without a yes"
        assert said(app) == []
        await pilot.press("s")
        await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "the question")
        await pilot.press("y")
        await until(pilot, lambda: any(": CANCELLED: exit code" in text for text in said(app)), "how it ended")
        await until(pilot, lambda: screen.latest.link.status == "ended", "its end")
        assert "committed" in screen.query_one(LogPane).all_text()
        await pilot.press("s")
        await until(pilot, lambda: said(app)[-1] == f"{trainer.name} has ended already", "nothing left to stop")
        assert app.screen is screen

    on_run(trainer, body)
    assert not processes_of(trainer)


def test_r_starts_another_attempt_after_a_question_and_follows_it(tmp_path: Path) -> None:
    path = READY["crashed"](tmp_path / "evidence")

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        assert "CRASHED" in shown(app)
        for answer in ("n", "y"):
            await pilot.press("r")
            await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "the question")
            assert f"Resume {path.name}?" in " ".join(shown(app).split())
            assert not processes_of(path)
            await pilot.press(answer)
            await until(pilot, lambda: app.screen is screen, "the run again")
        await until(pilot, lambda: said(app), "what came of it")
        assert said(app) == [f"{path.name} was started again"]
        await until(pilot, lambda: screen.going_on, "it is followed")
        assert processes_of(path)
        await pilot.press("r")
        await until(pilot, lambda: len(said(app)) == 2, "it goes on")
        assert said(app)[1] == f"{path.name} goes on"

    try:
        on_run(path, body)
    finally:
        asyncio.run(runs.stop(LocalTransport(), path, grace=0.1))


@pytest.mark.parametrize(("kind", "why"), [("failed_verdict", "a smoke"), ("good_train", "complete already")])
def test_what_cannot_be_resumed_is_told_and_left_as_it_is(kind: str, why: str, tmp_path: Path) -> None:
    path = READY[kind](tmp_path / "evidence")

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press("r", "y")
        await until(pilot, lambda: said(app), "why not")
        assert said(app)[0].startswith("not resumed: ")
        assert why in said(app)[0]

    on_run(path, body)
    assert not processes_of(path)


def test_readonly_stops_nothing_and_writes_nothing(trainer: Path, tmp_path: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        for offered in ("stop…", "export", "resume…"):
            assert offered not in shown(app)
        await pilot.press("s", "e", "r", "6", "e")
        for action in ("stop", "export", "resume"):
            await screen.run_action(action)
        await pilot.pause()
        assert app.screen is screen

    on_run(trainer, body, readonly=True, size=(240, 40))
    assert processes_of(trainer)
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]


# Kinds of runs

KINDS = {
    "spike": ("COMPLETED", "200 / 200"),
    "nan": ("✘ FAILED", "F-FINITE-001", "NaN", "1 non-finite"),
    "failed_checkpoint": ("COMPLETED", "✘ 1 FAILED", "100 failed"),
    "failed_verdict": ("✘ FAILED", "2 FAIL", "F-DISTILL-SMOKE-001"),
    "stalled": ("⚠ STALLED", "nothing heard for", "120 / 50,000"),
    "lost": ("LOST", "120 / 50,000"),
    "crashed": ("CRASHED", "SIGKILL"),
    "resumed": ("COMPLETED", "attempt 2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_went_wrong_stands_on_the_first_screen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatch.follower.STATUS_SECONDS", 0.1)

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await until(pilot, lambda: all(text in shown(app) for text in KINDS[kind]), f"{KINDS[kind]}")

    on_run(READY[kind](tmp_path / "evidence"), body)


def test_why_a_checkpoint_failed_is_found_with_the_arrow_keys(tmp_path: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await pilot.press("3", "left", "left")
        await until(pilot, lambda: "No space left on device" in shown(app), "why")

    on_run(READY["failed_checkpoint"](tmp_path / "evidence"), body)


def test_a_spike_of_one_step_is_in_the_picture(tmp_path: Path) -> None:
    def rows_above_10(path: Path) -> int:
        count = 0

        async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
            nonlocal count
            above = shown(app).partition(" 10 ┤")[0].splitlines()
            count = sum(any("\u2800" < letter < "\u2900" for letter in row) for row in above)

        on_run(path, body)
        return count

    assert rows_above_10(READY["spike"](tmp_path / "a")) > 0
    assert rows_above_10(good_train(tmp_path / "b")) == 0


# What is told


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went to the terminal that one hears or sees on the desktop: `bell`, or the text of a notification."""
    heard: list[str] = []
    write = HeadlessDriver.write

    def listen(driver: HeadlessDriver, data: str) -> None:
        if data.startswith("\x1b]9;"):
            heard.append(data.removeprefix("\x1b]9;").removesuffix("\x07"))
        write(driver, data)

    monkeypatch.setattr(HeadlessDriver, "write", listen)
    monkeypatch.setattr(KdConsoleApp, "bell", lambda self: heard.append("bell"))
    return heard


def with_nan_to_the_end(path: Path, heard: list[str], settings: Settings) -> list[str]:
    """What the app says when a verdict fails, and a little later the run ends."""

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        assert (heard, said(app)) == ([], [])
        append(path, go_on(screen, 41, 41, lambda step: math.nan))
        await until(pilot, lambda: any(v.verdict == "FAIL" for v in screen.latest.state.judged), "the verdict")
        await until(pilot, lambda: len(said(app)) == 1, "it is told")
        end = ending(41, 1, "NaN")
        append(path, numbered(stamped([end], start=screen.latest.state.last_t + 1), screen.latest.state.events))
        await until(pilot, lambda: len(said(app)) == 2, "the end is told")

    return said(on_run(path, body, settings=settings))


def test_a_verdict_that_fails_and_the_end_are_heard_and_seen(tmp_path: Path, heard: list[str]) -> None:
    path = live_run(tmp_path, steps=40, last_t=NOW - 30)
    told = with_nan_to_the_end(path, heard, Settings(fps=30))
    assert told == [f"{path.name}: ✘ FAIL F-FINITE-001", f"{path.name}: FAILED: NaN"]
    assert sorted(heard) == sorted(["bell", "bell", *told])


@pytest.mark.parametrize(("bell", "notify"), [(False, True), (True, False), (False, False)])
def test_bell_and_notification_can_be_turned_off_each(
    tmp_path: Path, heard: list[str], bell: bool, notify: bool
) -> None:
    path = live_run(tmp_path, steps=40, last_t=NOW - 30)
    told = with_nan_to_the_end(path, heard, Settings(fps=30, bell=bell, notify=notify))
    assert sorted(heard) == sorted([*(["bell"] * 2 if bell else []), *(told if notify else [])])


def test_a_good_end_is_told_once_and_is_no_error(tmp_path: Path, heard: list[str]) -> None:
    begin = stamped([*opening(150), *steps_between(1, 150)])
    whole = with_verdicts(stamped([*begin, *closing(150)]), train_contract(), ending(150))
    whole = shifted(whole, NOW - 30 - whole[-1].t)
    path = make_run(tmp_path, whole[: len(begin)], None, "train", living=True)
    told = f"{path.name}: COMPLETED: every step is done"

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        append(path, whole[len(begin) :])
        await until(pilot, lambda: screen.latest.state.end and said(app), "the end")
        assert said(app) == [told]
        assert [each.severity for each in app._notifications] == ["information"]

    on_run(path, body)
    assert sorted(heard) == sorted(["bell", told])


@pytest.mark.parametrize("kind", ["nan", "failed_verdict", "good_train"])
def test_what_was_so_before_it_was_opened_is_no_news(kind: str, tmp_path: Path, heard: list[str]) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        await until(pilot, lambda: not screen.latest.link.live, "the end of the following")
        assert (heard, said(app)) == ([], [])

    on_run(READY[kind](tmp_path), body)


def test_a_copy_goes_to_the_terminal_as_one_sequence(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: RunScreen) -> None:
        written: list[str] = []
        assert app._driver is not None
        monkeypatch.setattr(app._driver, "write", written.append)
        await pilot.press("3", "y")
        [sequence] = [text for text in written if text.startswith("\x1b]52;")]
        head, _, coded = sequence.rpartition(";")
        assert head == "\x1b]52;c"
        assert base64.b64decode(coded.removesuffix("\x07")).decode() == app.clipboard

    on_run(good, body)
