"""Past evidence of every kind in the whole app: what is seen of it, how it is replayed, and that nothing is touched."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from console.app import KdConsoleApp
from console.interactive import open_app
from console.replay import SPEEDS
from console.run_reader import RunReader
from console.screens import review as review_module
from console.screens.compare import CompareScreen
from console.screens.dashboard import Dashboard
from console.screens.home import HomeScreen
from console.screens.review import ReviewScreen
from console.screens.run import RunScreen
from console.widgets.layout import number
from console.widgets.log import LogPane
from console.widgets.provenance import provenance_lines
from engine.errors import RunError
from tests.console.app_rig import MIDDLE, NARROW, NOW, WIDE, frozen, in_app, listed, opened, reviewed, said
from tests.console.desk_app import shown, until
from tests.console.run_dirs import good_smoke, good_train, live_run, lost_run
from tests.old_evidence import EXPECTED, SCENES, kernel_lines, train_log, write_old

Shown = Callable[[KdConsoleApp, Pilot[Any], Any], Awaitable[None]]
COMMITTED = sorted(path.parent for path in (Path(__file__).parents[2] / "evidence").glob("*/events.jsonl"))
SMOKE = next(path for path in COMMITTED if path.name.endswith("smoke-ccc12b"))
"""One that passed."""
FEW_SCENES = ("asked-50-ran-62", "smoke", "stated-verdicts", "panic", "epochs", "several-logs", "manifest-only")
"""One of every sort; the others are slow here, and read in every test of what is read."""
PANES = ("chart", "verdicts", "checkpoints", "projection", "vitals", "log")
UNKNOWN = re.compile(r"\b(NaN|nan|inf|None|0 B|0 tensors)\b|19[67]\d-|sha256 …")
"""What is not known must not look like this."""
TOOK = {122.7: "2m 03s", 232.4: "3m 52s", 60.0: "1m 00s"}


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with frozen(monkeypatch):
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run of 200 steps that passed."""
    return good_train(tmp_path_factory.mktemp("run") / "evidence")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predecessor's run of 62 steps, of which 50 were asked for."""
    return SCENES["asked-50-ran-62"](tmp_path_factory.mktemp("old") / "phase3")


def on_review(path: Path, body: Shown, **options: Any) -> KdConsoleApp:
    """Opens evidence as `kdconsole review` does and does something there once it is read."""

    async def go(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await body(app, pilot, app.screen)

    return in_app(go, Path("nowhere"), review=[path], **options)


def on_both(path: Path, body: Shown) -> None:
    """Does something on each of the two screens that show a run."""
    on_review(path, body)

    async def go(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await body(app, pilot, app.screen)

    in_app(go, path.parent, run=path)


def head_of(app: KdConsoleApp) -> str:
    return "\n".join(shown(app).splitlines()[:3])


def texts(screen: Dashboard) -> dict[str, str]:
    """What each pane shows, as text."""
    return {name: screen._named(name).copy_text() for name in PANES}


def origin(screen: Dashboard) -> str:
    """Where the evidence comes from, with room for all of it."""
    return "\n".join(line.plain for line in provenance_lines(screen.view, 100))


def files_of(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(each.relative_to(path)): (each.stat().st_mtime_ns, each.read_bytes())
        for each in path.rglob("*")
        if each.is_file()
    }


def focused(screen: Dashboard) -> str | None:
    return screen.focused.id if screen.focused else None


# What is seen


@pytest.mark.parametrize(
    "scene", [name if name in FEW_SCENES else pytest.param(name, marks=pytest.mark.slow) for name in SCENES]
)
def test_the_predecessors_directories_show_losses_steps_duration_host_and_verdicts(scene: str, tmp_path: Path) -> None:
    expected = EXPECTED[scene]

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        loaded = screen.latest.review
        assert loaded is not None
        assert loaded.kind == expected.kind
        head, panes = head_of(app), texts(screen)
        assert ("DISPUTED" if expected.contradicted else expected.status) in head
        if expected.asked is not None and expected.status == "COMPLETED" and expected.asked != expected.steps:
            assert f"asked {expected.asked}, ran {expected.steps}" in head
            assert f"asked {expected.asked}, ran {expected.steps}" in panes["vitals"]
        elif expected.unit == "epoch":
            assert f"epoch {expected.steps} / " in head
            assert "x: epoch" in panes["chart"]
        elif expected.steps:
            assert re.search(rf"\b{expected.steps}( / \d+| steps)", head)
        if math.isfinite(expected.final):
            assert f"loss {number(expected.initial)} → {number(expected.final)}" in head
            assert f"loss {expected.initial:.4f} → {expected.final:.4f}" in origin(screen)
        took = TOOK.get(expected.seconds)
        assert (f"took {took}" if took else "no time is told") in head
        assert ("took         " + (took or "not said")) in panes["projection"] or expected.kind == "manifest"
        if expected.host:
            assert f"host       {expected.host}" in panes["vitals"]
            assert "dispatched 2026-05-01 12:00" in origin(screen)
        for identifier, (word, basis) in expected.bases.items():
            found = re.search(rf"[✔✘] {word} +{identifier} +(.*)", panes["verdicts"])
            assert found, identifier
            assert basis in found[1] or (basis == "stated, derived" and "both" in found[1])
        for identifier in expected.contradicted:
            assert "WHAT IS STATED IS NOT WHAT IS DERIVED" in panes["verdicts"]
            assert identifier in panes["verdicts"]
        assert not UNKNOWN.search("\n".join([shown(app), *panes.values()]))
        for key, name in zip("23456", PANES[1:], strict=True):  # and in the past of it
            await pilot.press(key, "left_square_bracket")
            assert not UNKNOWN.search(screen._named(name).copy_text())

    on_review(SCENES[scene](tmp_path / "old"), body)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_runs_open_and_stay_as_they_are(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / path.name)
    before = files_of(copy)

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        end = json.loads((path / "events.jsonl").read_text().splitlines()[-1])
        first = shown(app).splitlines()[0]
        assert end["status"] in first
        assert f"{end['steps']:,}" in first
        await pilot.press("s", "g", "r", "space", "0")
        assert app.screen is screen, "nothing of it can be stopped, fetched or resumed"
        assert not said(app)
        assert not UNKNOWN.search("\n".join(texts(screen).values()))

    on_review(copy, body)
    assert files_of(copy) == before


def test_what_was_changed_since_it_ended_is_told_and_not_mended(tmp_path: Path) -> None:
    copy = shutil.copytree(SMOKE, tmp_path / "run")
    (copy / "config.yaml").write_text("teacher: other\n")
    before = files_of(copy)

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        await until(pilot, lambda: "≠ CHANGED" in shown(app), "that it was changed")
        assert "config.yaml" in shown(app).splitlines()[0]

    on_review(copy, body)
    assert files_of(copy) == before


def test_remarks_are_seen_at_once_in_the_head_and_whole_in_their_pane(tmp_path: Path) -> None:
    path = SCENES["bare-log"](tmp_path / "bare")

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        assert "⚠ no dispatch.json: what was asked for is not known" in shown(app).splitlines()[2]
        assert "⚠ no dispatch.json: what was asked for is" in texts(screen)["vitals"]

    on_review(path, body)


def test_a_run_of_ours_whose_contract_is_lost_says_that_its_verdicts_are_derived(tmp_path: Path) -> None:
    copy = shutil.copytree(SMOKE, tmp_path / "run")
    (copy / "contract.yaml").unlink()
    (copy / "SHA256SUMS").unlink()

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        assert "no contract.yaml" in shown(app).splitlines()[2]
        assert "⚠ no contract.yaml" in texts(screen)["vitals"]
        assert "derived" in texts(screen)["verdicts"]
        await pilot.press("2", "enter")
        assert "basis" in texts(screen)["verdicts"]

    on_review(copy, body, size=(200, 60))


def test_a_run_that_goes_on_is_shown_as_it_is_here_and_said_not_to_have_ended(tmp_path: Path) -> None:
    path = live_run(tmp_path / "evidence", last_t=NOW - 1)

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        first, _, third = head_of(app).splitlines()
        assert "it has not ended" in first
        assert "▶ RUNNING" in first
        assert "link" not in third, "nothing is followed"
        assert screen.goes_on == ""

    on_review(path, body)


def test_a_run_that_left_no_end_is_lost(tmp_path: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        assert "? LOST" in shown(app).splitlines()[0]

    on_review(lost_run(tmp_path / "evidence"), body)


def test_a_run_on_a_host_is_not_asked_for(tmp_path: Path) -> None:
    path = live_run(tmp_path / "evidence", last_t=NOW - 1)
    manifest = json.loads((path / "dispatch.json").read_text())
    manifest["remote"] = {
        "host": "far.example",
        "run_dir": "/runs/x",
        "python": "/venv/bin/python",
        "engine": "/engine",
    }
    (path / "dispatch.json").write_text(json.dumps(manifest))

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        assert "its end is not here · a review does not ask far.example" in shown(app).splitlines()[0]
        assert "reach" not in vars(app)

    on_review(path, body)


def test_a_stream_that_breaks_off_in_the_middle_says_where(tmp_path: Path) -> None:
    path = good_train(tmp_path / "evidence")
    lines = (path / "events.jsonl").read_bytes().splitlines(keepends=True)
    (path / "events.jsonl").write_bytes(b"".join(lines[:200]) + b"{garbage}\n" + b"".join(lines[200:]))

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        assert "it cannot be read: events.jsonl" in head_of(app)
        assert len(screen.view.state.steps)

    on_review(path, body, size=(200, 40))


def test_the_bar_of_the_log_stands_where_its_lines_are(old: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        log = screen.query_one(LogPane)
        await until(pilot, lambda: log.scroll_offset.y > 0, "the last lines")
        assert log.vertical_scrollbar.position == log.scroll_offset.y

    on_review(old, body)


def test_only_the_last_lines_of_a_long_log_are_kept_and_its_past_says_so(tmp_path: Path) -> None:
    log = tmp_path / "launch.log"
    log.write_bytes(train_log(kernels=8_000))

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        await pilot.press("left_curly_bracket", *["right_square_bracket"] * 5)
        await pilot.pause()
        assert "only the last 5,000 lines are kept" in shown(app)

    on_review(log, body)


def test_the_end_of_a_log_has_no_exit_code(old: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        assert "exit 0" not in head_of(app), "nobody said what its process ended with"
        assert "every fatal and gate verdict is PASS" in head_of(app)

    on_review(old, body)


# Reading


class Watched(RunReader):
    """A reader that a test can look at."""

    made: ClassVar[list[RunReader]] = []

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.made.append(self)


def test_a_large_log_shows_how_far_it_is_and_escape_leaves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review_module, "RunReader", Watched)
    block = ("\n".join(kernel_lines(4_000)) + "\n").encode()
    log = tmp_path / "launch.log"
    log.write_bytes(train_log() + block * (150_000_000 // len(block)))

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await until(pilot, lambda: isinstance(app.screen, ReviewScreen), "the review")
        screen = app.screen
        assert isinstance(screen, ReviewScreen)
        await until(pilot, lambda: " MB of 150 MB" in shown(app), "how far it is")
        assert "◔ READING" in shown(app).splitlines()[0]
        assert not screen.loaded.is_set()
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen), "the list")
        [reader] = Watched.made
        read = -1
        while read != reader.offset:  # it may be in the middle of a piece
            read = reader.offset
            await asyncio.sleep(1.0)
        assert 0 < read < reader.total, "nothing is read any more"

    in_app(body, Path("nowhere"), review=[log], wait=False)


# Replay


def test_space_plays_from_the_beginning_stops_and_goes_on(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: Dashboard) -> None:
        present = shown(app)
        await pilot.press("space")
        await until(pilot, lambda: screen.view.scrubbed, "the beginning")
        first = screen.view.now
        await until(pilot, lambda: screen.view.now > first, "it moves")
        assert re.search(r"▶ replay [\d,]+x · .* of ", shown(app).splitlines()[0])
        await pilot.press("space")
        moment = screen.view.now
        assert "⏪ as of " in shown(app).splitlines()[0]
        await pilot.pause(0.2)
        assert screen.view.now == moment, "it stands still"
        for _ in SPEEDS:
            await pilot.press("greater_than_sign")
        await pilot.press("space")
        await until(pilot, lambda: not screen.view.scrubbed, "the end")
        assert not screen.replay.playing
        assert screen._clock is None, "nothing is drawn while nothing moves"
        await until(pilot, lambda: shown(app) == present, "the end as it was")

    on_both(good, body)


def test_angles_change_the_speed_within_what_there_is_and_the_head_says_it(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: Dashboard) -> None:
        await pilot.press("left_curly_bracket", *["less_than_sign"] * len(SPEEDS))
        assert screen.replay.speed == 1
        for speed in SPEEDS[1:]:
            await pilot.press("greater_than_sign")
            assert screen.replay.speed == speed
        await pilot.press("greater_than_sign")
        assert screen.replay.speed == SPEEDS[-1]
        await pilot.pause()
        assert "1,000x" in shown(app).splitlines()[0]
        await pilot.press("0", "less_than_sign")
        assert said(app)[-1] == "replay at 300x", "where the head says something else"

    on_both(good, body)


def test_braces_go_to_both_ends_and_brackets_between_them(good: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: Dashboard) -> None:
        present = shown(app)
        await pilot.press("left_curly_bracket")
        assert screen.view.now == screen.latest.state.first_t
        assert not len(screen.view.state.steps)
        await pilot.press("right_square_bracket")
        later = screen.view.now
        assert later > screen.latest.state.first_t
        await pilot.press("right_square_bracket", "left_square_bracket")
        assert screen.view.now == pytest.approx(later)
        await pilot.press("right_curly_bracket")
        await until(pilot, lambda: shown(app) == present, "the end")

    on_both(good, body)


def test_a_log_without_times_is_replayed_by_lines(old: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        await pilot.press("left_curly_bracket", *["right_square_bracket"] * 45)
        await pilot.pause()
        line, last = int(screen.view.now), screen.latest.state.last_t
        head, step = head_of(app), screen.view.state.last_step
        assert f"as of line {line} of {last:.0f}" in head
        assert step is not None
        assert 0 < step.step < 62
        assert f"step {step.step}" in head
        assert not re.search(r"\d\d:\d\d:\d\d|ago|ETA", head)
        logged = screen.query_one(LogPane).all_text().splitlines()
        assert len(logged) == line
        assert logged[-1].startswith(f"line {line} ")
        await pilot.press("less_than_sign", "space")
        await until(pilot, lambda: "lines/s · line" in shown(app).splitlines()[0], "that lines are played")
        await until(pilot, lambda: int(screen.view.now) > line, "further lines")

    on_review(old, body)


@pytest.mark.parametrize("size", [NARROW, MIDDLE, WIDE])
def test_the_head_says_what_moment_is_shown_in_every_width(old: Path, good: Path, size: tuple[int, int]) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        await pilot.press(*["left_square_bracket"] * 4)
        await pilot.pause()
        assert re.search("⏪ as of .* of ", shown(app).splitlines()[0])
        await pilot.press("space")
        await until(pilot, lambda: "▶ " in shown(app).splitlines()[0], "that it is played")

    for path in (old, good):
        on_review(path, body, size=size)


# Keys of the panes


def test_digits_tab_and_z_go_through_the_panes(old: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        assert focused(screen) == "chart"
        for key, name in zip("234561", (*PANES[1:], "chart"), strict=True):
            await pilot.press(key)
            assert focused(screen) == name
        await pilot.press("tab")
        assert focused(screen) == PANES[1]
        await pilot.press("shift+tab")
        assert focused(screen) == "chart"
        for key, large in (("z", True), ("escape", False)):
            await pilot.press(key)
            assert (screen.maximized is not None) == large
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen), "the list")

    on_review(old, body)


def test_every_key_of_the_chart_changes_what_is_seen_and_x_says_why_not(old: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        async def press(key: str) -> str:
            await pilot.press(key)
            await pilot.pause()
            return str(screen.chart.border_title)

        assert "linear y" in await press("l")
        assert "x: step" in await press("x")
        assert said(app) == ["x stays as it is: a log here has no times"]
        assert "EMA 0.95" in await press("plus")
        assert "EMA 0.90" in await press("minus")
        assert "zoomed" in await press("i")
        assert "zoomed" not in await press("o")
        assert "Agreement" in await press("p")
        assert "log y" in await press("0")
        await press("f")
        assert not screen.chart.sight.following
        await press("f")
        await press("left")
        assert "step 62" in screen.chart.readout
        assert "lr" not in screen.chart.readout
        assert "after" not in screen.chart.readout

    on_review(old, body)


def test_a_filter_and_a_search_find_lines_of_the_log(old: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        log = screen.query_one(LogPane)
        await pilot.press("slash", *"loss", "enter")
        assert log.filter_text == "loss"
        assert len(log.all_text().splitlines()) == 63
        await pilot.press("slash", *["backspace"] * 4, "enter", "ctrl+f", *"Output", "enter", "n")
        assert "1 of 1" in str(log.border_title)
        await pilot.press("N")
        assert "1 of 1" in str(log.border_title)
        assert not screen.query_one("#ask", Input).display

    on_review(old, body, size=MIDDLE)


def test_y_and_e_take_a_pane_out_of_the_app_and_leave_the_evidence(old: Path, tmp_path: Path) -> None:
    before = files_of(old)

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        await pilot.press("5", "y")
        assert "ticket     PMAT-706 · phase 3" in app.clipboard
        await pilot.press("1", "e")
        await until(pilot, lambda: "written" in said(app)[-1], "the files")

    on_review(old, body)
    assert files_of(old) == before
    table = (tmp_path / "phase3-chart.csv").read_text()
    assert "7.6746" in table
    assert "nan" not in table.lower()


def test_readonly_forbids_the_export_alone(old: Path, tmp_path: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        await pilot.press("e", "y", "space")
        assert screen.replay.playing
        assert not [text for text in said(app) if "written" in text]

    on_review(old, body, readonly=True)
    assert not list(tmp_path.glob("*.csv"))


# Ways there


def test_several_pieces_are_listed_and_enter_opens_each(tmp_path: Path, old: Path) -> None:
    folder = tmp_path / "many"
    shutil.copytree(old, folder / "old")
    good_smoke(folder / "ours")
    SCENES["bare-log"](folder / "bare")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        home = await listed(app, pilot)
        assert len(home._known.rows) == 3
        seen = set()
        for _ in home._known.rows:
            await pilot.press("enter")
            screen = await reviewed(app, pilot)
            seen.add(screen.latest.review.kind.value if screen.latest.review else "")
            await pilot.press("escape")
            await until(pilot, lambda: app.screen is home, "the list")
            await pilot.press("down")
        assert seen == {"predecessor", "run", "log"}

    in_app(body, Path("nowhere"), review=[folder])


def test_one_piece_leads_back_to_a_list_of_it(old: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        await pilot.press("escape")
        home = await listed(app, pilot)
        assert [row.path for row in home._known.rows] == [old]

    on_review(old, body)


def test_home_opens_what_is_not_ours_for_review_and_follows_what_is(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    SCENES["panic"](evidence / "old")
    ours = good_smoke(evidence)
    bare = shutil.copytree(ours, evidence / "bare")
    (bare / "dispatch.json").unlink()

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        home = await listed(app, pilot)
        app.open_run(ours)
        assert isinstance(await opened(app, pilot), RunScreen)
        for path, text in ((evidence / "old", "CRASHED"), (bare, "no dispatch.json")):
            await pilot.press("escape")
            await until(pilot, lambda: app.screen is home, "the list")
            app.open_run(path)
            assert (await reviewed(app, pilot)).where == "review"
            assert text in head_of(app)

    in_app(body, evidence)


def test_old_and_new_are_compared(tmp_path: Path, old: Path) -> None:
    ours = good_train(tmp_path / "ours")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        app.compare_runs([ours, old])
        await until(pilot, lambda: isinstance(app.screen, CompareScreen), "the comparison")
        screen = app.screen
        assert isinstance(screen, CompareScreen)
        await until(pilot, lambda: not screen._read.to_read, "both are read")
        assert "phase3-smoke" in shown(app).splitlines()[0]
        await pilot.press("x")
        assert "no times" in said(app)[-1]
        await pilot.pause()
        assert "x: step" in str(screen.chart.border_title)
        await pilot.press("left")
        await pilot.pause()
        assert not UNKNOWN.search(shown(app))

    in_app(body, tmp_path, size=(160, 50))


def test_nothing_to_review_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing"):
        open_app(tmp_path, review=[tmp_path / "missing"])


def test_hostile_names_and_lines_do_no_harm(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07[red]x[/]\x1b[2J"
    path = write_old(
        tmp_path / "evil\x1b[31m[b]",
        logs={"launch.log": train_log(more=[evil, "F-EVIL-001: PASS " + evil])},
        manifest={"run_name": evil, "host": evil, "ticket": evil, "steps": "50"},
    )

    async def body(app: KdConsoleApp, pilot: Pilot[Any], screen: ReviewScreen) -> None:
        for key in "123456":
            await pilot.press(key)
            await pilot.pause()
            assert "\x1b" not in shown(app)
        assert "[red]x" in texts(screen)["log"], "shown as it is, and not as markup"

    on_review(path, body)
