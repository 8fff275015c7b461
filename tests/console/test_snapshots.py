"""Every screen in four sizes, the dashboard in three kinds of colour and of every kind of run, as it was last approved.

After a change that is meant: `KDCONSOLE_UPDATE_SNAPSHOTS=1 python -m pytest tests/console/test_snapshots.py`, and look
at what `git diff` says of tests/console/snapshots.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.app import App
from textual.pilot import Pilot

from console import room as room_module
from console.app import KdConsoleApp
from console.screens.compare import CompareScreen
from console.screens.confirm import ConfirmScreen
from console.screens.dashboard import Dashboard
from console.screens.help import HelpScreen
from console.screens.new_run import NewRunScreen
from console.settings import Settings
from tests.console.answer_runs import broken_evaluation, evaluated, evaluating, held_out_evaluation
from tests.console.app_rig import MIDDLE, NARROW, NOW, SIZES, WIDE, frozen, in_app, listed
from tests.console.desk_app import until
from tests.console.pace_runs import fast_live_run, fast_run, prepare_run
from tests.console.run_dirs import READY, good_train, live_run, nan_run
from tests.console.snapshots import picture, same
from tests.old_evidence import SCENES

GIB = 1 << 30
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory, a home and a machine that are the same everywhere."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/me/.config")  # named by the help, read by nobody here
    (home / "kd").mkdir()
    monkeypatch.chdir(home / "kd")
    monkeypatch.setattr(room_module, "find_gpu", lambda: None)
    monkeypatch.setattr(room_module, "free_memory", lambda: 60 * GIB)
    monkeypatch.setattr(room_module, "free_disk", lambda directory: 400 * GIB)
    for name in [name for name in os.environ if name.startswith("KDCONSOLE_")]:
        monkeypatch.delenv(name)
    with frozen(monkeypatch):
        yield home / "kd"


async def at_rest(app: App[Any], pilot: Pilot[Any]) -> None:
    """Waits until two looks in a row see the same."""
    before = ""
    for _ in range(200):
        if isinstance(app.screen, Dashboard | CompareScreen):
            app.screen.chart.redraw()
        await pilot.pause(0.02)
        drawn = picture(app, styles=True)
        if drawn == before:
            return
        before = drawn
    raise AssertionError(f"it never comes to rest\n{before}")


def run_of(kind: str, evidence: Path) -> Path:
    made = {
        "live": lambda: live_run(evidence, last_t=NOW - 1),
        "fast_live": lambda: fast_live_run(evidence, NOW - 1),
        "fast": lambda: fast_run(evidence),
        "no_peak": lambda: fast_live_run(evidence, NOW - 1, None),
        "prepare": lambda: prepare_run(evidence, 64, NOW - 1),
        "evaluating": lambda: evaluating(evidence, NOW - 1, 60),
        "evaluation": lambda: evaluated(evidence),
        "broken_evaluation": lambda: broken_evaluation(evidence),
        "held_out_evaluation": lambda: held_out_evaluation(evidence),
    }
    return made[kind]() if kind in made else READY[kind](evidence)


def hold_run(name: str, kind: str, size: tuple[int, int], *keys: str, styles: bool = False, **options: Any) -> None:
    """Holds the dashboard of a run, after some keys, against its file."""

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await at_rest(app, pilot)
        await pilot.press(*keys)
        await at_rest(app, pilot)
        same(name, picture(app, styles=styles))

    in_app(body, Path("evidence"), size=size, run=run_of(kind, Path("evidence").absolute()), **options)


@sizes
def test_run(size: tuple[int, int]) -> None:
    hold_run(f"run-{size[0]}x{size[1]}", "live", size)


@pytest.mark.parametrize("colours", ["dark", "light", "no-color"])
def test_run_in_colours(colours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theme = "kdconsole-light" if colours == "light" else "kdconsole-dark"
    if colours == "no-color":
        monkeypatch.setenv("NO_COLOR", "1")
    hold_run(f"run-{colours}", "failed_verdict", WIDE, styles=True, settings=Settings(theme=theme, fps=30))


@pytest.mark.parametrize("kind", ["spike", "nan", "failed_checkpoint", "failed_verdict", "stalled"])
def test_run_of_every_kind(kind: str) -> None:
    hold_run(f"run-{kind.replace('_', '-')}", kind, WIDE)


@sizes
@pytest.mark.parametrize("kind", ["fast_live", "prepare"])
def test_run_that_tells_its_pace(kind: str, size: tuple[int, int]) -> None:
    """Where one pane is shown it is the projection, which has the speed of steps, or of work without them."""
    hold_run(f"run-{kind.replace('_', '-')}-{size[0]}x{size[1]}", kind, size, "4")


@pytest.mark.parametrize("size", [MIDDLE, WIDE], ids=["80x24", "120x40"])
@pytest.mark.parametrize("kind", ["evaluating", "evaluation", "broken_evaluation", "held_out_evaluation"])
def test_run_that_evaluates(kind: str, size: tuple[int, int]) -> None:
    hold_run(f"run-{kind.replace('_', '-')}-{size[0]}x{size[1]}", kind, size)


@pytest.mark.parametrize("kind", ["fast", "no_peak"])
def test_run_that_told_its_pace(kind: str) -> None:
    hold_run(f"run-{kind.replace('_', '-')}", kind, WIDE)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("cursor", ("left", "left", "left")),
        ("past", ("left_square_bracket",) * 12),
        ("verdict-full-screen", ("2", "enter", "z")),
        ("log-filter", ("slash", *"phase")),
    ],
)
def test_run_after_keys(name: str, keys: tuple[str, ...]) -> None:
    hold_run(f"run-{name}", "good_train", MIDDLE, *keys)


@pytest.mark.parametrize("size", [NARROW, MIDDLE, WIDE], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("kind", ["replay", "old"])
def test_review(kind: str, size: tuple[int, int], here: Path) -> None:
    """One of ours in the middle of its replay, and one of the predecessor's."""
    name = f"review-{kind}-{size[0]}x{size[1]}"
    path = good_train(here / "evidence") if kind == "replay" else SCENES["asked-50-ran-62"](here / "phase3")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        if kind == "replay":
            await pilot.press(*["left_square_bracket"] * 20, *["greater_than_sign"] * 2)
        await at_rest(app, pilot)
        same(name, picture(app))

    in_app(body, Path("evidence"), size=size, review=[path])


@pytest.mark.parametrize("key", ["2", "5"])
def test_review_panes(key: str, here: Path) -> None:
    path = SCENES["contradiction"](here / "phase3")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await pilot.press(key, "enter")
        await at_rest(app, pilot)
        same(f"review-pane-{key}", picture(app))

    in_app(body, Path("evidence"), size=MIDDLE, review=[path])


@sizes
def test_home(size: tuple[int, int], here: Path) -> None:
    for kind in ("live", *READY):
        run_of(kind, here / "evidence")
    (here / "evidence" / "broken").mkdir()
    (here / "evidence" / "broken" / "dispatch.json").write_text("{")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await listed(app, pilot)
        await pilot.press("down", "space", "down")
        await at_rest(app, pilot)
        same(f"home-{size[0]}x{size[1]}", picture(app))

    in_app(body, here / "evidence", size=size)


def test_home_without_runs() -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await listed(app, pilot)
        await at_rest(app, pilot)
        same("home-empty", picture(app))

    in_app(body, Path("evidence"), size=MIDDLE)


@sizes
def test_compare(size: tuple[int, int], here: Path) -> None:
    good_train(here / "evidence", 160, name="baseline")
    nan_run(here / "evidence")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await listed(app, pilot)
        await pilot.press("space", "down", "space", "c")
        await until(pilot, lambda: isinstance(app.screen, CompareScreen), "the comparison")
        screen = app.screen
        assert isinstance(screen, CompareScreen)
        await until(pilot, lambda: not screen._read.to_read, "both are read")
        await at_rest(app, pilot)
        same(f"compare-{size[0]}x{size[1]}", picture(app))
        if size == MIDDLE:
            await pilot.press("tab")
            await at_rest(app, pilot)
            same("compare-table", picture(app))

    in_app(body, here / "evidence", size=size)


@sizes
def test_new_run(size: tuple[int, int], here: Path) -> None:
    (here / "mine.yaml").write_text(
        "teacher: builtin:teacher\nstudent: builtin:student\ndata: {path: builtin:stdlib}\n"
    )

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await listed(app, pilot)
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, NewRunScreen), "the screen")
        screen = app.screen
        assert isinstance(screen, NewRunScreen)
        await until(pilot, lambda: screen._prepared is not None, "the checks")
        await at_rest(app, pilot)
        same(f"new-run-{size[0]}x{size[1]}", picture(app))

    in_app(body, Path("evidence"), size=size)


@sizes
def test_help(size: tuple[int, int], here: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await listed(app, pilot)
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpScreen), "the help")
        await at_rest(app, pilot)
        same(f"help-{size[0]}x{size[1]}", picture(app))

    in_app(body, Path("evidence"), size=size)


@sizes
def test_question(size: tuple[int, int]) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await pilot.press("s")
        await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "the question")
        await at_rest(app, pilot)
        same(f"question-{size[0]}x{size[1]}", picture(app))

    evidence = Path("evidence").absolute()
    in_app(body, evidence, size=size, run=run_of("live", evidence))
