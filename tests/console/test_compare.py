"""Compare: several runs in one chart and one table, kept up to date, and every key."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from textual.pilot import Pilot

from console.actions import ACTIONS
from console.run_reader import load_run
from console.screens.compare import CompareScreen
from console.widgets.differences_table import DifferencesTable
from console.widgets.loss_chart import LossChart
from dispatch.supervisor import write_atomic
from tests.console.desk_app import DeskApp, line_with, shown, until
from tests.console.run_dirs import append, failed_verdict_run, good_smoke, good_train, live_run, nan_run, steps_between
from tests.streams import EPOCH

NOW = EPOCH + 60.0
Body = Callable[[DeskApp, CompareScreen, Pilot[None]], Awaitable[None]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A training that passed and one that ended in NaN."""
    evidence = tmp_path_factory.mktemp("compare") / "evidence"
    return [good_train(evidence, 120, name="good"), nan_run(evidence)]


def comparing(
    paths: Sequence[Path], body: Body, *, size: tuple[int, int] = (120, 45), readonly: bool = False, now: float = NOW
) -> None:
    """Shows the comparison and does something there once all runs were read."""

    async def go() -> None:
        screen = CompareScreen(paths, clock=lambda: now)
        app = DeskApp(screen, readonly=readonly)
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: not screen._read.to_read, "all runs are read")
            await body(app, screen, pilot)

    asyncio.run(go())


def test_chart_and_table_stand_over_each_other(two: list[Path]) -> None:
    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        told = shown(app)
        assert "comparing 2 runs   good · nan" in told.splitlines()[0]
        assert "Differences, ≠ not as in the first run" in told
        header = line_with(app, "1 good  ")
        assert "2 nan" in header
        status = line_with(app, "status  ")
        assert "■ COMPLETED" in status
        assert "≠ ✘ FAILED" in status
        assert "train                 " in line_with(app, "mode  ")
        assert "≠" not in line_with(app, "mode  ")

    comparing(two, body)


def test_both_runs_are_in_the_chart_under_their_names(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    laid: list[list[str]] = []
    overlay = LossChart.overlay

    def watched(self: LossChart, runs: Sequence[tuple[str, object]]) -> None:
        laid.append([name for name, _ in runs])
        overlay(self, runs)  # type: ignore[arg-type]

    monkeypatch.setattr(LossChart, "overlay", watched)

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        assert laid[0] == []
        assert laid[-1] == ["good", "nan"]

    comparing(two, body)


def test_what_differs_is_bold_and_has_a_glyph_and_a_change(two: list[Path]) -> None:
    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        screen.query_one(DifferencesTable).scroll_to(y=20, animate=False)
        await pilot.pause()
        table = screen.query_one(DifferencesTable)
        line = next(y for y in range(table.size.height) if table.render_line(y).text.startswith("train, best"))
        bold = "".join(s.text for s in table.render_line(line) if s.style and s.style.bold)
        values = [load_run(path).state.steps.column("loss") for path in two]
        assert f"≠ {min(values[1][:-1]):.3f} at" in bold
        assert f"{min(values[0]):.3f}" not in bold
        assert " %" in table.render_line(line).text

    comparing(two, body)


def test_the_names_stay_on_top_while_the_table_scrolls(two: list[Path]) -> None:
    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press("tab", "end")
        await pilot.pause()
        assert "2 nan" in line_with(app, "1 good  ")
        assert "steps/s" in shown(app)

    comparing(two, body)


def test_a_wide_table_scrolls_sideways_under_its_labels(tmp_path: Path) -> None:
    paths = [good_smoke(tmp_path, name=f"kd-{n}", created=EPOCH + n) for n in range(6)]

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press("tab")
        assert "6 kd-5" not in shown(app)
        screen.query_one(DifferencesTable).scroll_to(x=200, animate=False)
        await pilot.pause()
        assert "6 kd-5" in shown(app)
        assert "■ COMPLETED" in line_with(app, "│ status  ")

    comparing(paths, body, size=(70, 20))


@pytest.mark.parametrize("size", [(60, 20), (40, 10)])
def test_a_small_screen_shows_one_of_the_two_and_tab_switches(two: list[Path], size: tuple[int, int]) -> None:
    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        chart, table = screen.query_one(LossChart), screen.query_one(DifferencesTable)
        assert (chart.display, table.display) == (True, False)
        await pilot.press("tab")
        assert (chart.display, table.display, table.has_focus) == (False, True, True)
        assert "status" in shown(app)
        await pilot.press("shift+tab")
        assert (chart.display, table.display, chart.has_focus) == (True, False, True)

    comparing(two, body, size=size)


@pytest.mark.parametrize("size", [(12, 5), (240, 70)])
def test_no_size_is_an_error(two: list[Path], size: tuple[int, int]) -> None:
    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press("tab", "end", "tab", "l")

    comparing(two, body, size=size)


def test_what_is_appended_to_a_run_appears_and_its_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("console.screens.compare.REFRESH_SECONDS", 0.02)
    going, over = live_run(tmp_path, steps=30, target=60), good_smoke(tmp_path)
    state = load_run(going).state

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        assert "30 of 60" in line_with(app, "│ steps ")
        more = steps_between(31, 35)
        append(going, [msgspec.structs.replace(e, seq=state.events + n, t=NOW) for n, e in enumerate(more)])
        await until(pilot, lambda: "35 of 60" in line_with(app, "│ steps "), "the new steps are seen")
        (going / "supervisor.jsonl").write_text("")
        assert state.run is not None
        record = {"v": 1, "run": state.run.run, "exit_code": None, "signal": 9, "started": 1, "ended": 2, "seconds": 1}
        write_atomic(going / "exit.json", json.dumps(record).encode())  # as a supervisor does: never half there
        await until(pilot, lambda: "✖ CRASHED" in shown(app), "the end is seen")

    comparing([going, over], body)


def test_a_directory_that_is_no_run_stands_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        assert "? UNREADABLE" in line_with(app, "status  ")
        assert "no manifest, no stream and no log" in line_with(app, "problem  ")

    comparing([good_smoke(tmp_path), tmp_path / "nothing"], body)


def test_names_are_shown_as_text_and_never_as_markup(tmp_path: Path) -> None:
    paths = [good_smoke(tmp_path, name=name) for name in ("[red]a[/]", "[/oops]")]

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        assert "1 [red]a[/]" in line_with(app, "2 [/oops]  ")

    comparing(paths, body, size=(120, 60))


# Every action


def test_every_action_of_the_screen_has_a_method() -> None:
    for action in ACTIONS:
        if "compare" in action.where:
            assert hasattr(CompareScreen, f"action_{action.name}"), action.name


@pytest.mark.parametrize(
    ("key", "method", "argument"),
    [
        ("l", "toggle_log", ()),
        ("x", "toggle_axis", ()),
        ("plus", "smooth", (1,)),
        ("minus", "smooth", (-1,)),
        ("i", "zoom", (1,)),
        ("o", "zoom", (-1,)),
        ("0", "reset", ()),
    ],
)
def test_the_keys_of_the_chart_reach_it(
    two: list[Path], monkeypatch: pytest.MonkeyPatch, key: str, method: str, argument: tuple[int, ...]
) -> None:
    called: list[tuple[int, ...]] = []
    monkeypatch.setattr(LossChart, method, lambda self, *args: called.append(args))

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press(key)
        assert called == [argument]

    comparing(two, body, size=(80, 24))


def test_y_copies_the_table_with_tabs_between_its_cells(two: list[Path]) -> None:
    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press("y")
        lines = app.clipboard.splitlines()
        assert lines[0] == "section\twhat\tgood\tnan"
        assert "run\tstatus\t■ COMPLETED\t✘ FAILED" in lines
        assert app.said == [f"copied {len(lines)} lines of the table"]

    comparing(two, body)


def test_e_writes_table_and_chart_beside_what_is_there(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare.svg").write_text("mine")

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press("e")
        assert app.said == [f"written: {tmp_path}/compare-2.csv, {tmp_path}/compare-2.svg"]

    comparing(two, body)
    assert (tmp_path / "compare.svg").read_text() == "mine"
    table = list(csv.reader((tmp_path / "compare-2.csv").open()))
    assert table[0] == ["section", "what", "good", "nan"]
    picture = (tmp_path / "compare-2.svg").read_text()
    assert picture.lstrip().startswith(("<svg", "<?xml"))
    assert "good" in picture


def test_a_place_that_cannot_be_written_is_told(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[Path]:
        raise PermissionError(13, "Permission denied", "compare.csv")

    monkeypatch.setattr("console.screens.compare.write_new", refuse)

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press("e")
        assert app.said == ["not written: compare.csv: Permission denied"]

    comparing(two, body)


def test_readonly_writes_nothing(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press("e")
        assert "export" not in shown(app)

    comparing(two, body, readonly=True)
    assert not list(tmp_path.iterdir())


def test_escape_goes_back_and_ends_the_reading(tmp_path: Path) -> None:
    async def body(app: DeskApp, screen: CompareScreen, pilot: Pilot[None]) -> None:
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is not screen, "the screen is gone")
        await until(pilot, lambda: not any(w.group == "read" and w.is_running for w in app.workers), "the worker ended")

    comparing([live_run(tmp_path), failed_verdict_run(tmp_path)], body)
