"""Home: the list of runs, what is said above and below it, and every key."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from console import run_list
from console.actions import ACTIONS
from console.row import Row
from console.row_filter import KEYS
from console.run_index import RunIndex
from console.run_list import SORTS, ordered, place, summary
from console.run_reader import RunReader
from console.screens.home import HomeScreen
from console.widgets.runs_table import CURSOR, MARKED, RunsTable, placed
from tests.console.desk_app import DeskApp, line_with, shown, until
from tests.console.run_dirs import (
    READY,
    append,
    failed_verdict_run,
    good_smoke,
    good_train,
    live_run,
    nan_run,
    steps_between,
)
from tests.old_evidence import SCENES
from tests.streams import EPOCH

NOW = EPOCH + 3_600.0
Body = Callable[[DeskApp, HomeScreen, Pilot[None]], Awaitable[None]]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evidence directory with every kind of run once."""
    evidence = tmp_path_factory.mktemp("home") / "evidence"
    for make in READY.values():
        make(evidence)
    live_run(evidence, last_t=NOW - 1)
    (evidence / "broken").mkdir()
    (evidence / "broken" / "dispatch.json").write_text("{")
    return evidence


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs: a smoke that failed, a training that passed, one that goes on."""
    monkeypatch.chdir(tmp_path)
    evidence = tmp_path / "evidence"
    failed_verdict_run(evidence, name="bad", created=EPOCH + 10)
    good_train(evidence, 60, name="good", created=EPOCH + 20, host="gx10")
    live_run(evidence, steps=40, last_t=NOW - 1)
    return evidence


def at_home(
    body: Body, *evidence: Path, size: tuple[int, int] = (120, 30), readonly: bool = False, now: float = NOW
) -> None:
    """Shows Home and does something there once every stream was read."""

    async def go() -> None:
        screen = HomeScreen(evidence, clock=lambda: now)
        app = DeskApp(screen, readonly=readonly)
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: screen._known.looked and not screen._known.to_fold, "every stream is read")
            await body(app, screen, pilot)

    asyncio.run(go())


def names(app: DeskApp) -> list[str]:
    """The first words of the listed runs' names, from the top."""
    table = app.screen.query_one(RunsTable)
    return [row.name or row.id for row in table._rows]


def row_of(**fields: object) -> Row:
    return Row(path=Path("/e") / str(fields.get("id", "r")), **{"id": "r", **fields})  # type: ignore[arg-type]


# What is seen


def test_every_run_has_a_line_with_what_matters(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        bad, good = line_with(app, "bad "), line_with(app, "good ")
        for text in ("✘ FAILED", "smoke", "30", "6.500", "✘2 ✔14", "60 min", "box"):
            assert text in bad, text
        for text in ("■ COMPLETED", "train", "60 / 60  100 %", "✘1 ✔14", "gx10"):
            assert text in good, text
        going = line_with(app, f"{CURSOR}  ▶ RUNNING")
        assert "3 runs in ./evidence" in shown(app)
        for text in ("40 / 50,000    0 %", "◌6 ✔9", "1 s"):
            assert text in going, text

    at_home(body, few)


def test_the_line_above_counts_what_needs_a_look(everything: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        for text in ("⚠ 1 stalled", "▶ 1 running", "✘ 3 failed", "? 1 lost", "? 1 unreadable", "12 runs in "):
            assert text in shown(app).splitlines()[0]

    at_home(body, everything)


def test_what_goes_on_stands_on_top_and_then_the_newest(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        assert names(app)[1:] == ["good", "bad"]
        assert "running first, then newest" in shown(app)

    at_home(body, few)


def test_the_lines_below_tell_of_the_run_under_the_cursor(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        assert "RUNNING  phase train" in shown(app)
        await pilot.press("down", "down")
        told = shown(app)
        assert "F-DISTILL-SMOKE-001: expected eval.loss falls" in told
        assert "✘ FAIL F-DISTILL-SMOKE-001, F-DISTILL-PIPELINE-001" in told
        assert "cpu Some CPU, fp32" in told
        assert f"./evidence/{screen.table.cursor_row.path.name}" in told

    at_home(body, few)


def test_a_broken_directory_says_what_is_wrong_with_it(everything: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("end")
        assert CURSOR in line_with(app, "? UNREADABLE  broken")
        assert "? UNREADABLE  dispatch.json: no JSON" in shown(app)

    at_home(body, everything)


def test_where_there_is_no_run_it_says_how_to_start_one_and_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()

    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        told = " ".join(shown(app).split())
        assert "n starts a smoke on the built-in models: 60 s, needs nothing" in told
        assert f"{tmp_path}/here (no run in it)" in told
        assert f"{tmp_path}/there (not there yet; the first run makes it)" in told
        await pilot.press("enter", "space", "c", "s", "r", "down", "end")
        await pilot.press("n")
        assert (app.opened, app.compared, app.new_runs) == ([], [], 1)

    at_home(body, tmp_path / "here", tmp_path / "there", size=(140, 30))


def test_it_is_painted_before_anything_is_read(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        screen = HomeScreen([few], clock=lambda: NOW)
        monkeypatch.setattr(screen, "look_after_runs", lambda: None)
        async with DeskApp(screen).run_test(size=(100, 24)) as pilot:
            assert "Looking for runs" in shown(pilot.app)

    asyncio.run(go())


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (200, 60)])
def test_the_most_important_columns_stay_in_every_size(everything: Path, size: tuple[int, int]) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        header = line_with(app, "status")
        for column in ("status", "run", "step", "verdicts"):
            assert column in header
        assert ("host" in header) == (size[0] > 100)
        assert "✘1 ◌5 ✔9" in line_with(app, "✘ FAILED      nan")
        assert all(len(line) <= size[0] for line in shown(app).splitlines())

    at_home(body, everything, size=size)


def test_why_a_run_ended_is_cut_and_not_left_out_where_there_is_little_room() -> None:
    row = row_of(status="FAILED", reason="F-DISTILL-SMOKE-001: expected eval.loss falls, observed 5 to 6.5")
    assert run_list.detail(row, 40)[0].plain == "✘ FAILED  F-DISTILL-SMOKE-001: expected…"


@pytest.mark.parametrize("size", [(20, 6), (3, 2), (240, 70)])
def test_no_size_is_an_error(everything: Path, size: tuple[int, int]) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("down", "end", "space", "s", "slash", "x", "escape")
        assert len(screen.table._rows) == 12

    at_home(body, everything, size=size)


def test_names_are_shown_as_text_and_never_as_markup(tmp_path: Path) -> None:
    good_smoke(tmp_path, name="[red]mark[/] [/nothing] [@click=app.bell]x[/]")

    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        assert "[red]mark[/] [/nothing]" in shown(app)
        await pilot.press("slash", *"[/no")
        assert "filter: [/no" in shown(app)

    at_home(body, tmp_path, size=(160, 24))


def test_without_colour_the_cursor_and_the_marks_are_characters(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("down", "space", "down")
        assert f" {MARKED} ■ COMPLETED" in line_with(app, "good ")
        assert f"{CURSOR}  ✘ FAILED" in line_with(app, "bad ")

    at_home(body, few)


# Every action


def test_every_action_of_the_screen_has_a_method() -> None:
    for action in ACTIONS:
        if "home" in action.where:
            assert hasattr(HomeScreen, f"action_{action.name}"), action.name


def test_enter_opens_the_run_under_the_cursor(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("down", "enter")
        assert [path.name for path in app.opened] == [screen.table.cursor_row.path.name]
        assert screen.table.cursor_row.name == "good"

    at_home(body, few)


def test_two_clicks_open_a_run_and_one_moves_the_cursor(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.click(RunsTable, offset=(10, 4))
        assert screen.table.cursor_row.name == "bad"
        assert app.opened == []
        await pilot.click(RunsTable, offset=(10, 4), times=2)
        assert app.opened == [screen.table.cursor_row.path]

    at_home(body, few)


def test_n_asks_for_a_new_run(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("n")
        assert app.new_runs == 1

    at_home(body, few)


def test_readonly_offers_no_new_run(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("n")
        assert app.new_runs == 0
        assert "new run" not in shown(app)

    at_home(body, few, readonly=True)


def test_marked_runs_are_compared_in_the_order_of_their_marks(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("end", "space", "home", "space", "c")
        [compared] = app.compared
        assert compared == [screen.table._rows[-1].path, screen.table._rows[0].path]
        assert "2 marked" in shown(app)

    at_home(body, few)


def test_one_marked_run_is_compared_with_the_one_under_the_cursor(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("space", "down", "c")
        assert app.compared == [[row.path for row in screen.table._rows[:2]]]

    at_home(body, few)


def test_nothing_is_compared_with_nothing(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("c")
        await pilot.press("space", "c")
        await pilot.press("space", "c")
        assert app.compared == []
        assert app.said == ["mark two runs or more with space, then compare them"] * 3

    at_home(body, few)


def test_a_seventh_mark_is_refused(everything: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        for _ in range(7):
            await pilot.press("space", "down")
        assert "6 runs are marked" in app.said[0]
        await pilot.press("c")
        assert len(app.compared[0]) == 6

    at_home(body, everything)


def test_sorting_goes_through_the_columns_and_the_cursor_stays_on_its_run(everything: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "down")
        chosen = screen.table.cursor_row.path
        for name in (*SORTS[1:], SORTS[0]):
            await pilot.press("s")
            if name:
                assert f"{name} ▼" in shown(app)
            assert screen.table.cursor_row.path == chosen
        await pilot.press("r")
        assert "newest, reversed" in shown(app)
        await pilot.press("s")
        assert "status ▲" in shown(app)
        assert screen.table.cursor_row.path == chosen

    at_home(body, everything)


def test_a_click_on_a_column_sorts_by_it_and_a_second_one_turns_it_round(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        column = line_with(app, "status").index("run")
        await pilot.click(RunsTable, offset=(column + 1, 1))
        assert (screen._sort, screen._reverse) == ("run", False)
        await pilot.click(RunsTable, offset=(column + 1, 1))
        assert (screen._sort, screen._reverse) == ("run", True)

    at_home(body, few)


def test_the_filter_narrows_while_one_types_and_stays_in_sight(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"GOO")
        assert names(app) == ["good"]
        await pilot.press("enter")
        assert "filter: GOO · 1 of 3" in shown(app)
        assert not screen.query_one("#filter").display
        assert screen.focused is screen.table
        await pilot.press("enter")
        assert len(app.opened) == 1

    at_home(body, few)


def test_escape_in_the_filter_shows_all_again(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"bad", "enter")
        assert names(app) == ["bad"]
        await pilot.press("slash")
        assert screen.query_one("#filter", Input).value == "bad"
        await pilot.press("escape")
        assert len(names(app)) == 3
        assert "filter" not in shown(app).splitlines()[1]
        assert screen.focused is screen.table

    at_home(body, few)


def test_a_filter_that_nothing_passes_says_so_and_the_keys_still_work(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"zzz", "enter")
        assert "No run passes zzz." in shown(app)
        await pilot.press("enter", "space", "s")
        await pilot.press("slash", "escape", "enter")
        assert len(app.opened) == 1

    at_home(body, few)


def test_a_filter_that_nobody_understands_is_said_at_its_line_and_where_the_list_was(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"statsu:x")
        assert shown(app).count("statsu:x: unknown key; did you mean status:?") == 2
        await pilot.press("enter")
        assert "statsu:x: unknown key; did you mean status:?" in shown(app)
        assert "No run passes statsu:x." in shown(app)
        await pilot.press("slash", *"verdict:fail mode:train", "enter")
        assert names(app) == ["good"]
        assert "unknown key" not in shown(app)

    at_home(body, few)


def test_the_line_of_the_filter_says_what_it_understands(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("slash")
        for key in KEYS:
            assert f"{key}:" in shown(app)

    at_home(body, few)


def test_the_predecessors_runs_stand_among_ours(few: Path) -> None:
    SCENES["asked-50-ran-62"](few / "predecessor" / "first")
    SCENES["bare-log"](few / "stage-c")

    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        old, log = line_with(app, "phase3-smoke  first"), line_with(app, "stage-c")
        for text in ("■ COMPLETED", "train", "62 / 50  124 %", "7.204", "✔2", "gx10", "Qwen2.5-Coder-1.5B-Instruct →"):
            assert text in old, text
        for text in ("■ COMPLETED", "124 / 124  100 %", "6.010", "✔2"):
            assert text in log, text
        await pilot.press("end", "enter")
        assert app.opened == [few / "stage-c"]
        assert "a log" in shown(app)

    at_home(body, few, size=(200, 30))


@pytest.mark.parametrize("readonly", [False, True])
def test_what_was_read_once_is_there_at_once_the_next_time(
    few: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, readonly: bool
) -> None:
    monkeypatch.setattr("console.row_cache.SETTLED_SECONDS", -3_600.0)

    file = own_cache / "kdconsole" / "rows"

    async def kept(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        if not readonly:  # not only when it is left: it may be killed
            await until(pilot, file.exists, "the rows are kept")

    at_home(kept, few, readonly=readonly)
    assert file.exists() is not readonly
    if not readonly:
        read: list[Path] = []
        advance = RunReader.advance
        monkeypatch.setattr(RunReader, "advance", lambda self: read.append(self.path) or advance(self))
        at_home(kept, few)
        assert len(set(read)) == 1, "only of the one that goes on"


def test_a_list_that_takes_long_to_look_at_is_looked_at_less_often(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("console.screens.home.REFRESH_SECONDS", 0.01)
    monkeypatch.setattr("console.screens.home.LOOKING_SHARE", 0.001)
    looks: list[float] = []
    look = RunIndex.look

    def slow(self: RunIndex) -> Iterator[None]:
        looks.append(time.monotonic())
        time.sleep(0.02)
        return look(self)

    monkeypatch.setattr(RunIndex, "look", slow)

    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: len(looks) >= 2, "a second look")
        before = len(looks)
        await asyncio.sleep(0.5)
        assert len(looks) == before, "20 s are to pass after a look of 20 ms"

    at_home(body, few)


def test_phase_and_model_are_shown_only_where_nothing_is_cut_for_them() -> None:
    rows = [
        row_of(id="20251009-085319-train-16aaaf", status="COMPLETED", step=1, target=50_000, phase="4", teacher="t")
    ]
    for width in range(200, 20, -1):
        columns, gap = placed(rows, 0.0, width)
        if {"phase", "model"} & {each.column.name for each in columns}:
            assert (gap, [each.width for each in columns if each.column.name == "run"]) == (2, [28])
            assert not any(each.short for each in columns if each.column.short)


def test_what_one_sorts_by_is_in_sight(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        assert "model" not in line_with(app, "status")
        await pilot.press(*["s"] * SORTS.index("model"))
        assert "model ▼" in line_with(app, "status")

    at_home(body, few, size=(80, 24))


def test_refreshing_reads_the_directories_again(few: Path) -> None:
    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        await pilot.press("down", "space")
        chosen = screen.table.cursor_row.path
        good_smoke(few, name="brand new", created=EPOCH + 1_000)
        await pilot.press("ctrl+r")
        await until(pilot, lambda: "brand new" in shown(app), "the new run is seen")
        await until(pilot, lambda: not screen._known.to_fold)
        assert screen.table.cursor_row.path == chosen
        assert screen._marked == [chosen]

    at_home(body, few)


def test_what_changes_is_noticed_without_a_key(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("console.screens.home.REFRESH_SECONDS", 0.05)

    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        going = screen.table.cursor_row
        shutil.rmtree(next(row.path for row in screen.table._rows if row.name == "bad"))
        seq = 20 + sum(1 for _ in (going.path / "events.jsonl").open())
        append(going.path, [e.__class__(**{**_fields(e), "seq": seq, "t": NOW}) for e in steps_between(41, 41)])
        await until(pilot, lambda: "41 / 50,000" in shown(app), "the new step is seen")
        await until(pilot, lambda: "bad" not in names(app), "the directory is gone")

    at_home(body, few)


def _fields(event: object) -> dict[str, object]:
    return {name: getattr(event, name) for name in event.__struct_fields__}  # type: ignore[attr-defined]


def test_nothing_is_read_while_another_screen_lies_over_it(few: Path) -> None:
    from textual.screen import Screen

    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        app.push_screen(Screen())
        await until(pilot, screen._hidden.is_set, "the list is hidden")
        looks = 0
        index_look = screen._index.look

        def look() -> object:
            nonlocal looks
            looks += 1
            return index_look()

        screen._index.look = look  # type: ignore[method-assign, assignment]
        screen._wake.set()
        await until(pilot, lambda: not screen._wake.is_set(), "the worker went round")
        assert looks == 0
        app.pop_screen()
        await until(pilot, lambda: looks > 0, "the list is looked after again")

    at_home(body, few)


# Pure parts


def test_unknown_values_come_last_either_way() -> None:
    rows = [row_of(id=name, loss=loss) for name, loss in (("a", None), ("b", 2.0), ("c", float("nan")), ("d", 1.0))]
    assert [row.id for row in ordered(rows, "loss", reverse=False)] == ["d", "b", "c", "a"]
    assert [row.id for row in ordered(rows, "loss", reverse=True)] == ["c", "b", "d", "a"]


def test_status_sorts_by_how_much_it_needs_a_look() -> None:
    rows = [row_of(id=word, status=word) for word in ("COMPLETED", "FAILED", "RUNNING", "STALLED", "LOST")]
    assert [row.id for row in ordered(rows, "status", reverse=False)] == [
        "STALLED", "RUNNING", "FAILED", "LOST", "COMPLETED"
    ]  # fmt: skip


def _cell_of(row: Row, name: str) -> str:
    return next(column.text(row, 0.0) for column in run_list.COLUMNS if column.name == name)


def test_steps_are_never_rounded_up_to_a_hundred_percent() -> None:
    row = row_of(step=49_999, target=50_000)
    assert _cell_of(row, "step") == "49,999 / 50,000   99 %"


def test_the_run_keeps_its_width_and_the_least_important_columns_go() -> None:
    rows = [row_of(id="20251009-085319-train-16aaaf", status="COMPLETED", step=1, target=50_000, host="gx10")]
    seen = []
    for width in range(200, 20, -1):
        columns, gap = placed(rows, 0.0, width)
        assert 3 + sum(each.width for each in columns) + gap * (len(columns) - 1) <= max(width, 30)
        shown_names = [each.column.name for each in columns]
        if not seen or seen[-1] != shown_names:
            seen.append(shown_names)
    gone = [set(before) - set(after) for before, after in itertools.pairwise(seen)]
    assert [name for names in gone for name in names] == [
        "model", "phase", "host", "mode", "last data", "held-out", "loss", "verdicts", "step"
    ]  # fmt: skip


def test_a_path_is_written_as_one_would_type_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home" / "here")
    assert place(tmp_path / "home" / "here" / "evidence") == "./evidence"
    assert place(tmp_path / "home" / "runs") == "~/runs"
    assert place(Path("/srv/x\x1b")) == "/srv/x\\x1b"
    assert summary([], [tmp_path / "home" / "here"]).plain == "0 runs in ."


def test_a_smoke_has_no_steps_to_reach(tmp_path: Path) -> None:
    good_smoke(tmp_path, 30)
    nan_run(tmp_path)

    async def body(app: DeskApp, screen: HomeScreen, pilot: Pilot[None]) -> None:
        assert "%" not in line_with(app, "smoke ")
        assert "60 / 200   30 %" in line_with(app, "nan ")

    at_home(body, tmp_path)
