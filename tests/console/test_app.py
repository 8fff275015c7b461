"""The app around its screens: ways in and out, help, palette, theme, --readonly; and that every action has a test."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.command import CommandPalette
from textual.pilot import Pilot

from console.actions import ACTIONS, SCREENS, Action, Where, binding_id, named
from console.app import KdConsoleApp
from console.keys import canonical
from console.screens.compare import CompareScreen
from console.screens.guarded import CHANGING
from console.screens.help import HelpScreen
from console.screens.home import HomeScreen
from console.screens.new_run import NewRunScreen
from console.screens.run import RunScreen
from console.settings import Settings
from tests.console.app_rig import NOW, frozen, in_app, listed, opened, said
from tests.console.desk_app import shown, until
from tests.console.run_dirs import failed_verdict_run, good_train, live_run, nan_run

TESTS: dict[str, str] = {
    "app.help": "test_app.py::test_help_opens_on_every_screen_and_speaks_of_it",
    "app.command_palette": "test_app.py::test_the_palette_finds_an_action_and_does_it",
    "app.leave": "test_app.py::test_leaving_tells_of_the_runs_that_go_on_and_of_no_others",
    "app.toggle_dark": "test_app.py::test_d_switches_between_dark_and_light",
    "home.open": "test_home.py::test_enter_opens_the_run_under_the_cursor",
    "home.new_run": "test_home.py::test_n_asks_for_a_new_run",
    "home.mark": "test_home.py::test_marked_runs_are_compared_in_the_order_of_their_marks",
    "home.compare": "test_home.py::test_marked_runs_are_compared_in_the_order_of_their_marks",
    "home.sort": "test_home.py::test_sorting_goes_through_the_columns_and_the_cursor_stays_on_its_run",
    "home.reverse": "test_home.py::test_sorting_goes_through_the_columns_and_the_cursor_stays_on_its_run",
    "home.filter": "test_home.py::test_the_filter_narrows_while_one_types_and_stays_in_sight",
    "home.refresh": "test_home.py::test_refreshing_reads_the_directories_again",
    "run.back": "test_run_screen.py::test_escape_goes_back_to_the_list_and_a_run_can_be_opened_from_there",
    "run.next_pane": "test_run_screen.py::test_digits_and_tab_go_to_each_pane_and_round",
    "run.previous_pane": "test_run_screen.py::test_digits_and_tab_go_to_each_pane_and_round",
    **{
        f"run.pane_{number}": "test_run_screen.py::test_digits_and_tab_go_to_each_pane_and_round"
        for number in range(1, 7)
    },
    "run.full_screen": "test_run_screen.py::test_z_gives_the_whole_screen_to_a_pane_whichever_one_goes_to",
    **{
        f"run.{name}": "test_run_screen.py::test_every_key_of_the_chart_changes_what_is_seen"
        for name in ("page", "log_y", "axis", "smooth_more", "smooth_less", "zoom_in", "zoom_out", "reset")
    },
    "run.scrub_back": "test_run_screen.py::test_brackets_go_through_the_past_and_back_to_the_present",
    "run.scrub_forward": "test_run_screen.py::test_brackets_go_through_the_past_and_back_to_the_present",
    "run.follow": "test_run_screen.py::test_f_lets_the_chart_stay_where_it_is_or_go_along",
    "run.filter": "test_run_screen.py::test_a_filter_narrows_the_log_while_one_types_and_stays",
    "run.search": "test_run_screen.py::test_a_search_goes_to_the_next_and_the_previous_line_with_it",
    "run.next_match": "test_run_screen.py::test_a_search_goes_to_the_next_and_the_previous_line_with_it",
    "run.previous_match": "test_run_screen.py::test_a_search_goes_to_the_next_and_the_previous_line_with_it",
    "run.copy": "test_run_screen.py::test_y_copies_what_each_pane_shows",
    "run.export": "test_run_screen.py::test_e_writes_data_and_picture_of_the_chart_beside_what_is_there",
    "run.resume": "test_run_screen.py::test_r_starts_another_attempt_after_a_question_and_follows_it",
    "run.stop": "test_run_screen.py::test_s_stops_the_run_after_a_question_and_says_how_it_ended",
    **{
        f"{where}.{name}": f"test_review_screen.py::{test}"
        for where in ("run", "review")
        for name, test in (
            ("play", "test_space_plays_from_the_beginning_stops_and_goes_on"),
            ("slower", "test_angles_change_the_speed_within_what_there_is_and_the_head_says_it"),
            ("faster", "test_angles_change_the_speed_within_what_there_is_and_the_head_says_it"),
            ("to_start", "test_braces_go_to_both_ends_and_brackets_between_them"),
            ("to_end", "test_braces_go_to_both_ends_and_brackets_between_them"),
        )
    },
    "review.scrub_back": "test_review_screen.py::test_braces_go_to_both_ends_and_brackets_between_them",
    "review.scrub_forward": "test_review_screen.py::test_braces_go_to_both_ends_and_brackets_between_them",
    **{
        f"review.{name}": "test_review_screen.py::test_digits_tab_and_z_go_through_the_panes"
        for name in ("back", "next_pane", "previous_pane", "full_screen", *(f"pane_{n}" for n in range(1, 7)))
    },
    **{
        f"review.{name}": "test_review_screen.py::test_every_key_of_the_chart_changes_what_is_seen_and_x_says_why_not"
        for name in ("page", "log_y", "axis", "smooth_more", "smooth_less", "zoom_in", "zoom_out", "reset", "follow")
    },
    **{
        f"review.{name}": "test_review_screen.py::test_a_filter_and_a_search_find_lines_of_the_log"
        for name in ("filter", "search", "next_match", "previous_match")
    },
    **{
        f"review.{name}": "test_review_screen.py::test_y_and_e_take_a_pane_out_of_the_app_and_leave_the_evidence"
        for name in ("copy", "export")
    },
    "compare.back": "test_compare.py::test_escape_goes_back_and_ends_the_reading",
    "compare.next_pane": "test_compare.py::test_a_small_screen_shows_one_of_the_two_and_tab_switches",
    "compare.previous_pane": "test_app.py::test_shift_tab_goes_back_between_chart_and_table",
    **{
        f"compare.{name}": "test_compare.py::test_the_keys_of_the_chart_reach_it"
        for name in ("log_y", "axis", "smooth_more", "smooth_less", "zoom_in", "zoom_out", "reset")
    },
    "compare.copy": "test_compare.py::test_y_copies_the_table_with_tabs_between_its_cells",
    "compare.export": "test_compare.py::test_e_writes_table_and_chart_beside_what_is_there",
    "new.back": "test_new_run.py::test_escape_leaves_a_line_first_and_then_the_screen",
    "new.start": "test_new_run.py::test_two_keys_from_home_start_a_smoke_of_the_built_in_models",
    "new.mode": "test_new_run.py::test_the_mode_is_changed_by_key_arrow_and_mouse",
    "new.overrides": "test_new_run.py::test_enter_ends_a_line_and_a_second_one_starts_what_it_made",
    "new.details": "test_new_run.py::test_details_are_scrolled_with_the_keys_and_left_again",
    "new.check_again": "test_new_run.py::test_checks_are_made_again_when_asked",
    "new.host": "test_new_run.py::test_h_goes_through_the_hosts_and_back_to_this_machine",
    "home.hosts": "../faults/test_remote_app.py::test_a_host_from_the_first_key_to_the_last_file",
    "run.fetch": "../faults/test_remote_app.py::test_a_host_from_the_first_key_to_the_last_file",
    "hosts.back": "test_hosts_screen.py::test_without_hosts_it_says_how_to_get_one",
    "hosts.preflight": "test_hosts_screen.py::test_a_preflight_stands_there_and_the_next_lane_is_named",
    "hosts.trust": "test_hosts_screen.py::test_a_key_is_trusted_after_a_typed_yes_and_nothing_less",
    "hosts.bootstrap": (
        "test_hosts_screen.py::test_what_cannot_be_made_is_said_and_leaving_meanwhile_asks_for_a_second_press"
    ),
    "hosts.clean": "test_hosts_screen.py::test_leftovers_go_after_a_typed_yes",
    "hosts.read_again": "test_hosts_screen.py::test_a_file_that_is_wrong_is_said_and_can_be_read_again",
    "choose.take": "../faults/test_remote_app.py::test_a_host_from_the_first_key_to_the_last_file",
    "choose.cancel": "../faults/test_remote_app.py::test_a_host_from_the_first_key_to_the_last_file",
    "help.close": "test_help.py::test_help_closes_with_each_of_its_keys",
    "confirm.yes": "test_help.py::test_a_question_is_answered_no_unless_yes_is_meant",
    "confirm.no": "test_help.py::test_a_question_is_answered_no_unless_yes_is_meant",
}
"""The test that presses the key of each action on its screen."""
HERE = Path(__file__).parent


def each_action() -> dict[str, tuple[Action, Where]]:
    """Every action on every screen that has it, by its id in a key map."""
    return {binding_id(a, where): (a, where) for a in ACTIONS for where in a.where}


def test_every_action_has_a_test_on_its_screen() -> None:
    assert sorted(TESTS) == sorted(each_action())


@pytest.mark.parametrize("identifier", TESTS)
def test_the_test_of_an_action_is_there_and_presses_its_key(identifier: str) -> None:
    action, _ = each_action()[identifier]
    file, _, name = TESTS[identifier].partition("::")
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    words = {
        node.value for node in ast.walk(function) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    digits = {digit for word in words if word.isdigit() for digit in word}
    pressed = {canonical(word) for word in words | digits}
    keys = {canonical(key) for key in action.keys.split(",")}
    loops = {"close"}  # its test takes the keys from the registry
    assert action.name in loops or keys & pressed, f"{TESTS[identifier]} presses none of {action.keys}"


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with frozen(monkeypatch):
        yield


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """A run that goes on, one that passed, one that failed."""
    live_run(tmp_path / "evidence", last_t=NOW - 1)
    good_train(tmp_path / "evidence", 60, name="good")
    failed_verdict_run(tmp_path / "evidence", name="bad")
    return tmp_path / "evidence"


async def at(app: KdConsoleApp, pilot: Pilot[Any], where: str) -> None:
    """Goes from Home to a screen as an operator does."""
    await listed(app, pilot)
    if where == "run":
        await pilot.press("enter")
        await opened(app, pilot)
    if where == "compare":
        await pilot.press("space", "down", "space", "c")
        await until(pilot, lambda: isinstance(app.screen, CompareScreen), "the comparison")
    if where == "new":
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, NewRunScreen), "the new run")
    assert getattr(app.screen, "where", None) == where


# Everywhere


@pytest.mark.parametrize("where", ["home", "run", "compare", "new"])
@pytest.mark.parametrize("key", ["question_mark", "f1"])
def test_help_opens_on_every_screen_and_speaks_of_it(evidence: Path, where: Where, key: str) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await at(app, pilot, where)
        below = app.screen
        await pilot.press(key)
        await until(pilot, lambda: isinstance(app.screen, HelpScreen), "the help")
        assert f"Keys: {SCREENS[where]}" in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is below, f"{where} again")

    in_app(body, evidence)


def test_the_palette_finds_an_action_and_does_it(evidence: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await at(app, pilot, "run")
        await pilot.press("ctrl+p")
        await until(pilot, lambda: isinstance(app.screen, CommandPalette), "the palette")
        await pilot.press(*"verdicts")
        await until(pilot, lambda: "Show the falsifiers." in shown(app), "the action")
        await pilot.press("enter")
        await until(pilot, lambda: app.focused is not None and app.focused.id == "verdicts", "what it does")

    in_app(body, evidence)


@pytest.mark.parametrize("where", ["home", "run", "compare", "new"])
def test_d_switches_between_dark_and_light(evidence: Path, where: Where) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await at(app, pilot, where)
        for theme in ("kdconsole-light", "kdconsole-dark"):
            await pilot.press("d")
            assert app.theme == theme

    in_app(body, evidence)


def test_a_key_of_the_users_own_takes_the_place_of_ours(evidence: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await at(app, pilot, "run")
        assert "f7 leave" in shown(app).splitlines()[-1]
        await pilot.press("q")
        assert app._exit is False
        await pilot.press("f7")
        assert app._exit is True

    in_app(body, evidence, settings=Settings(keys={"app.leave": "f7"}))


def test_shift_tab_goes_back_between_chart_and_table(evidence: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await at(app, pilot, "compare")
        for name in ("table", "chart"):
            await pilot.press("shift+tab")
            assert app.focused is not None
            assert app.focused.id == name

    in_app(body, evidence)


# Leaving


def test_leaving_tells_of_the_runs_that_go_on_and_of_no_others(tmp_path: Path) -> None:
    live = live_run(tmp_path / "evidence", last_t=NOW - 1)
    ended = nan_run(tmp_path / "evidence")

    def left(run: Path | None) -> str:
        async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
            await pilot.press("q")
            await until(pilot, lambda: app._exit, "the way out")

        return in_app(body, tmp_path / "evidence", run=run).return_value or ""

    told = left(live)
    assert f"{live.name} goes on" in told
    assert f"kdconsole attach {live.name}" in told
    assert f"kdconsole stop {live.name}" in told
    assert left(ended) == ""
    assert left(None) == ""


def test_a_run_that_was_left_is_found_again_as_it_is_now(tmp_path: Path) -> None:
    live = live_run(tmp_path / "evidence", last_t=NOW - 1)
    pictures = []

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await at(app, pilot, "run")
        screen = app.screen
        assert isinstance(screen, RunScreen)
        assert screen.run_dir.path == live
        pictures.append(screen.latest.state.last_step)
        await pilot.press("q")

    for _ in range(2):
        in_app(body, tmp_path / "evidence")
    assert pictures[0] == pictures[1]


# Readonly


@pytest.mark.parametrize("where", ["home", "run", "compare", "new"])
def test_readonly_forbids_all_that_changes_something_by_key_by_name_and_in_the_palette(
    evidence: Path, tmp_path: Path, where: Where
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in evidence.rglob("*"))

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await listed(app, pilot)
        if where == "new":
            app.push_screen(NewRunScreen())  # there is no key that leads there
            await until(pilot, lambda: isinstance(app.screen, NewRunScreen), "the screen")
        else:
            await at(app, pilot, where)
        screen = app.screen
        changing = [a for a in ACTIONS if a.changes and where in a.where]
        assert changing
        for action in changing:
            assert action.name in CHANGING
            await pilot.press(*action.keys.split(","))
            await screen.run_action(action.name)
            await app.run_action(f"screen.{action.name}")
            await pilot.pause()
            assert app.screen is screen, action.name
            assert f" {action.label}" not in shown(app).splitlines()[-1]
        await pilot.press("ctrl+p")
        await until(pilot, lambda: isinstance(app.screen, CommandPalette), "the palette")
        await pilot.press(*changing[0].label[:4].replace(" ", ""))
        await pilot.pause(0.2)
        assert changing[0].help not in shown(app)

    in_app(body, evidence, size=(240, 40), readonly=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in evidence.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]


def test_a_run_that_cannot_be_opened_is_told_and_the_list_stays(evidence: Path) -> None:
    (evidence / "torn").mkdir()
    (evidence / "torn" / "dispatch.json").write_text("[bold]{")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = await listed(app, pilot)
        app.open_run(evidence / "torn")
        await until(pilot, lambda: said(app), "why not")
        assert app.screen is screen
        assert "torn" in said(app)[0]

    in_app(body, evidence)


def test_the_first_picture_is_there_before_anything_is_read(evidence: Path) -> None:
    async def go() -> None:
        app = KdConsoleApp((evidence,), Settings())
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            assert isinstance(app.screen, HomeScreen)
            assert "kdconsole" in shown(app).splitlines()[0]
            assert named("help").label in shown(app).splitlines()[-1]

    asyncio.run(go())
