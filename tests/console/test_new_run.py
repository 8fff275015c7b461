from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual import work
from textual.pilot import Pilot
from textual.widgets import Button, Input, Static

from console import prepare as prepare_module
from console import room as room_module
from console.launch import Job
from console.prepare import Draft, Prepared, prepare, values, yaml_files
from console.prepared_text import prepared_text, what
from console.screens import new_run
from console.screens.confirm import ConfirmScreen
from console.screens.help import HelpScreen
from console.screens.new_run import NewRunScreen
from console.widgets.one_of import OneOf
from console.widgets.source_list import SourceList
from engine.config import load_config
from tests.console.screen_rig import SIZES, Rig, told, until
from tests.console.test_room import qwen

HOSTILE = "[red]x[/] [@click=app.exit]\x1b[31m.yaml"
MINIMAL = "teacher: builtin:teacher\nstudent: builtin:student\ndata: {path: builtin:stdlib}\n"

Steps = Callable[[Rig, Pilot[None], NewRunScreen], Awaitable[None]]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(new_run, "TYPING_SECONDS", 0.0)
    monkeypatch.setattr(new_run, "CURSOR_SECONDS", 0.0)
    monkeypatch.setattr(room_module, "find_gpu", lambda: None)
    monkeypatch.chdir(tmp_path)


def on_screen(
    steps: Steps, *, size: tuple[int, int] = (120, 40), draft: Draft | None = None, app: Rig | None = None
) -> Rig:
    """Opens New run and takes steps on it."""
    rig = app or Rig(Path("evidence"))

    async def go() -> None:
        async with rig.run_test(size=size) as pilot:
            screen = NewRunScreen(draft)
            rig.push_screen(screen)
            await until(pilot, lambda: rig.screen is screen and screen.is_mounted, "the screen")
            await steps(rig, pilot, screen)

    asyncio.run(go())
    return rig


async def looked(pilot: Pilot[None], screen: NewRunScreen) -> Prepared:
    """What became of what is chosen now."""
    await until(pilot, lambda: screen._prepared is not None and screen._prepared.draft == screen.draft, "the checks")
    assert screen._prepared is not None
    return screen._prepared


async def type_into(pilot: Pilot[None], screen: NewRunScreen, line: str, text: str) -> None:
    screen.query_one(line).focus()
    await pilot.press(*("space" if c == " " else c for c in text))


def status(screen: NewRunScreen) -> str:
    return str(screen.query_one("#status", Static).content)


# Starting


def test_two_keys_from_home_start_a_smoke_of_the_built_in_models() -> None:
    rig = Rig(Path("evidence"))

    async def go() -> None:
        async with rig.run_test() as pilot:
            rig.action_new_run()  # what `n` does on Home
            await pilot.press("enter")
            await until(pilot, lambda: rig.jobs, "a start")

    asyncio.run(go())
    [job] = rig.jobs
    assert (job.config, job.evidence, job.host) == (load_config(template="builtin"), Path("evidence"), None)
    assert not job.overrides
    assert not job.force
    assert job.no_gate is None
    assert job.config.mode == "smoke"


def test_a_start_waits_for_the_checks_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go = threading.Event()

    def slow(*arguments: Any) -> Prepared:
        assert may_go.wait(20)
        return prepare(*arguments)

    monkeypatch.setattr(new_run, "prepare", slow)

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        assert "checking" in status(screen)
        await pilot.press("enter")
        assert "it starts once that is done" in status(screen)
        assert rig.jobs == []
        may_go.set()
        await until(pilot, lambda: rig.jobs, "the start")

    assert len(on_screen(steps).jobs) == 1


def test_a_change_calls_off_a_start_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go = threading.Event()

    def slow(*arguments: Any) -> Prepared:
        assert may_go.wait(20)
        return prepare(*arguments)

    monkeypatch.setattr(new_run, "prepare", slow)

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await pilot.press("enter", "m")
        may_go.set()
        assert (await looked(pilot, screen)).draft.mode == "train"
        assert "it starts once" not in status(screen)

    assert on_screen(steps).jobs == []


def test_the_button_starts_with_the_mouse_and_ctrl_j_from_within_a_line() -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await looked(pilot, screen)
        assert await pilot.click("#start")
        await until(pilot, lambda: len(rig.jobs) == 1, "the first start")
        await type_into(pilot, screen, "#name", "one")
        await pilot.press("ctrl+j")
        await until(pilot, lambda: len(rig.jobs) == 2, "the second start")

    assert [job.name for job in on_screen(steps).jobs] == [None, "one"]


def test_enter_ends_a_line_and_a_second_one_starts_what_it_made() -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await pilot.press("o")
        await pilot.press(*"train.steps=77")
        await pilot.press("enter")
        assert rig.jobs == []
        assert screen.focused is screen.query_one("#start")
        await pilot.press("enter")
        await until(pilot, lambda: rig.jobs, "the start")

    assert on_screen(steps).jobs[0].config.train.steps == 77


def test_a_second_press_starts_no_second_run() -> None:
    may_go = asyncio.Event()

    class Slow(Rig):
        @work
        async def start_run(self, job: Job) -> None:  # type: ignore[override]
            self.jobs.append(job)
            await may_go.wait()

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await looked(pilot, screen)
        await pilot.press("enter", "enter")
        await until(pilot, lambda: rig.jobs, "the start")
        await pilot.press("enter")
        assert await pilot.click("#start")
        assert len(rig.jobs) == 1
        assert "starting" in status(screen)
        may_go.set()
        await until(pilot, lambda: "ready" in status(screen), "the end of the start")
        await pilot.press("ctrl+j")  # a refused start can be tried again
        await until(pilot, lambda: len(rig.jobs) == 2, "another start")

    on_screen(steps, app=Slow(Path("evidence")))


def test_leaving_while_a_start_is_under_way_breaks_nothing() -> None:
    may_go = asyncio.Event()

    class Slow(Rig):
        @work
        async def start_run(self, job: Job) -> None:  # type: ignore[override]
            self.jobs.append(job)
            await may_go.wait()

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await looked(pilot, screen)
        await pilot.press("enter")
        await until(pilot, lambda: rig.jobs, "the start")
        await pilot.press("escape")
        await until(pilot, lambda: rig.screen is not screen, "the screen's end")
        may_go.set()
        await pilot.pause()

    on_screen(steps, app=Slow(Path("evidence")))


def test_after_a_run_was_started_the_checks_are_made_again() -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        first = await looked(pilot, screen)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(rig.screen, HelpScreen), "the run's screen, played by the help")
        await pilot.press("escape")
        await until(pilot, lambda: screen._prepared is not None and screen._prepared is not first, "other checks")

    def play(rig: Rig, job: Job) -> None:
        rig.action_help()

    on_screen(steps, app=Rig(Path("evidence"), start=play))


def test_readonly_starts_nothing_and_says_why() -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await looked(pilot, screen)
        await pilot.press("enter")
        assert screen.query_one("#start", Button).disabled
        assert "--readonly" in status(screen)

    assert on_screen(steps, app=Rig(Path("evidence"), readonly=True)).jobs == []


# Choosing


def test_the_mode_is_changed_by_key_arrow_and_mouse() -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await pilot.press("m")
        assert (await looked(pilot, screen)).draft.mode == "train"
        screen.query_one("#mode", OneOf).focus()
        await pilot.press("left")
        assert screen.draft.mode == "smoke"
        await pilot.press("right")
        assert screen.draft.mode == "train"
        assert await pilot.click("#mode", offset=(2, 0))
        assert screen.draft.mode == "smoke"
        assert await pilot.click("#mode", offset=(13, 0))
        prepared = await looked(pilot, screen)
        assert prepared.config is not None
        assert prepared.config.mode == "train"

    on_screen(steps)


def test_h_goes_through_the_hosts_and_back_to_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "hosts.yaml"
    file.write_text("hosts: {zeta: {}, gx10: {address: 127.0.0.1, port: 1}}\nlanes: [gx10]\n")
    monkeypatch.setenv("KDCONSOLE_HOSTS", str(file))

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        hosts = screen.query_one("#host", OneOf)
        await until(pilot, lambda: hosts.count == 3, "the hosts")
        seen = []
        for _ in range(3):
            await pilot.press("h")
            seen.append(screen.draft.host)
        assert seen == ["gx10", "zeta", None]
        await pilot.press("h")
        await until(pilot, lambda: screen._prepared is not None and screen._prepared.complete, "an answer")
        assert screen._prepared is not None
        assert screen._prepared.draft.host == "gx10"
        assert any("gx10" in refusal for refusal in screen._prepared.refusals)  # nobody answers at that port
        await pilot.press("enter")
        assert rig.jobs == []

    on_screen(steps)


def test_files_of_the_working_directory_are_offered_and_taken_by_the_cursor(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(MINIMAL + "train: {steps: 600}\n")
    (tmp_path / "a.yml").write_text(MINIMAL)
    (tmp_path / "c.txt").write_text(MINIMAL)

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        sources = screen.query_one(SourceList)
        await until(pilot, lambda: sources.option_count == 5, "the files")
        await pilot.press("down", "down", "down")
        prepared = await looked(pilot, screen)
        assert prepared.draft.file == Path("b.yaml")
        assert prepared.config is not None
        assert prepared.config.train.steps == 600
        assert await pilot.click(SourceList, offset=(2, 0))
        assert (await looked(pilot, screen)).draft.template == "builtin"

    on_screen(steps)


def test_a_typed_path_is_taken_at_once_and_the_cursor_goes_to_it(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine.yaml").write_text(MINIMAL + "train: {batch: 3}\n")

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await type_into(pilot, screen, "#file", "below/mine.yaml")
        prepared = await looked(pilot, screen)
        assert prepared.config is not None
        assert prepared.config.train.batch == 3
        assert prepared.draft.template is None
        screen.query_one(SourceList).focus()
        await pilot.press("home")
        assert screen.draft.file is None

    on_screen(steps)


def test_a_hostile_file_name_is_shown_as_text(tmp_path: Path) -> None:
    (tmp_path / HOSTILE.replace("/", "")).write_text("wrong: 1\n")

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        sources = screen.query_one(SourceList)
        await until(pilot, lambda: sources.option_count == 4, "the file")
        shown = str(sources.get_option_at_index(2).prompt)
        assert shown == "[red]x[] [@click=app.exit]\\x1b[31m.yaml"
        await pilot.press("down", "down")
        prepared = await looked(pilot, screen)
        assert any(problem.startswith("[red]x[] [@click=app.exit]\\x1b[31m.yaml: ") for problem in prepared.problems)
        await pilot.press("enter")  # the refusal shows it too
        [notice] = rig._notifications
        assert not notice.markup
        assert "[red]x[]" in told(screen)

    on_screen(steps)


def test_a_name_goes_with_the_run_cleaned() -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        screen.query_one("#name", Input).value = " [b]two\x1b[0m "
        screen.query_one(SourceList).focus()
        await looked(pilot, screen)
        await pilot.press("enter")
        await until(pilot, lambda: rig.jobs, "the start")

    assert on_screen(steps).jobs[0].name == "[b]two\\x1b[0m"


def test_variables_count_as_they_do_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCONSOLE_TRAIN__STEPS", "123")
    prepared = prepare(Draft(), Path("evidence"), {"KDCONSOLE_TRAIN__STEPS": "123"})
    assert prepared.config is not None
    assert prepared.config.train.steps == 123

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        assert (await looked(pilot, screen)).config == prepared.config

    on_screen(steps)


def test_a_first_draft_is_what_the_screen_opens_with(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(MINIMAL)

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        prepared = await looked(pilot, screen)
        assert prepared.draft == draft
        assert prepared.config is not None
        assert prepared.config.train.batch == 5

    draft = Draft("train", None, file, "train.batch=5")
    on_screen(steps, draft=draft)
    draft = Draft("smoke", "gx10", None, "train.batch=5 teacher=builtin:teacher student=builtin:student")
    on_screen(steps, draft=draft)


# What is wrong


def test_everything_wrong_with_a_configuration_is_shown_and_a_start_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(MINIMAL + "distill: {temprature: 3}\ntrain: {steps: -3}\n")

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await type_into(pilot, screen, "#file", "bad.yaml")
        await looked(pilot, screen)
        text = " ".join(told(screen).split())
        assert "bad.yaml: distill.temprature: unknown key; did you mean distill.temperature?" in text
        assert "bad.yaml: train.steps: -3: expected an integer of at least 1" in text
        assert "2 things are wrong" in status(screen)
        await pilot.press("enter", "enter")
        assert [n.severity for n in rig._notifications] == ["error"]

    assert on_screen(steps).jobs == []


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        (Draft(sets="train.stpes=3"), "--set train.stpes: unknown key; did you mean train.steps?"),
        (Draft(sets="train.steps"), "--set train.steps: expected KEY=VALUE, such as --set train.steps=500"),
        (Draft(sets="data.path='a b"), "set: no closing quotation; expected KEY=VALUE texts, quoted as in a shell"),
        (Draft(template=None), "no configuration yet; type the path of a YAML file, or choose one from the list"),
        (Draft(template=None, file=Path("none.yaml")), "none.yaml: no such file"),
        (Draft(template=None, file=Path("a\0b")), "a\\x00b: cannot be read"),
        (Draft(template=None, file=Path("~nobody-here/x")), "~nobody-here/x"),
    ],
)
def test_a_draft_that_is_no_configuration_says_why(draft: Draft, said: str) -> None:
    prepared = prepare(draft, Path("evidence"), {})
    assert prepared.config is None
    assert prepared.refusals == prepared.problems
    assert said in prepared.problems[0]


def test_a_quoted_value_keeps_its_blanks(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("text\n" * 100)
    prepared = prepare(Draft(sets="data.path='a b.txt' train.steps=300"), Path("evidence"), {})
    assert prepared.config is not None
    assert prepared.config.data.paths == [str(tmp_path / "a b.txt")]
    assert prepared.config.train.steps == 300
    assert prepared.refusals == ()


def test_each_missing_part_has_its_own_line(tmp_path: Path) -> None:
    sets = f"teacher={tmp_path}/no-teacher student={tmp_path}/no-student contract=none.yaml data.path=nowhere"
    prepared = prepare(Draft(sets=sets), Path("evidence"), {})
    outcomes = {check.name: check.outcome for check in prepared.checks}
    assert outcomes == {"contract": "FAIL", "teacher": "FAIL", "student": "FAIL", "data": "PENDING"}
    assert len(prepared.refusals) == 3
    assert prepared.room is None
    text = prepared_text(prepared, 100).plain
    assert "✘  teacher " in text
    assert "estimated once the models can be read" in text
    only_data = prepare(Draft(sets="data.path=nowhere"), Path("evidence"), {})
    assert [c.name for c in only_data.checks if c.outcome == "FAIL"] == ["data"]
    assert only_data.room is not None


def test_a_directory_that_went_away_is_a_problem_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert prepare(Draft(), tmp_path, {}).problems
    assert yaml_files(Path()) == []


def test_checks_are_made_again_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(MINIMAL + "train: {steps: 600}\n")

    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        first = await looked(pilot, screen)
        assert first.config is not None
        assert first.config.train.steps == 600
        file.write_text(MINIMAL + "train: {steps: 700}\n")
        (tmp_path / "y.yaml").write_text(MINIMAL)
        await pilot.press("ctrl+r")
        await until(pilot, lambda: screen._prepared is not None and screen._prepared != first, "other checks")
        again = await looked(pilot, screen)
        assert again.config is not None
        assert again.config.train.steps == 700
        await until(pilot, lambda: screen.query_one(SourceList).option_count == 5, "the new file")
        assert screen.draft == first.draft

    on_screen(steps, draft=Draft(template=None, file=file))


# Room


@pytest.fixture
def production(tmp_path: Path) -> Draft:
    """The gx10 template on models that are not really there, at a batch that no machine holds."""
    qwen(tmp_path / "1.5b", hidden=1536, intermediate=8960, layers=28, heads=12, rows=151_936)
    qwen(tmp_path / "0.5b", hidden=896, intermediate=4864, layers=24, heads=14, rows=151_936)
    (tmp_path / "corpus.txt").write_text("text\n" * 100)
    sets = "teacher=1.5b student=0.5b data.path=corpus.txt train.device=cpu train.batch=65536 train.accumulation=1"
    return Draft("train", "gx10", None, sets)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[2]])
def test_too_little_room_is_shown_with_its_table_and_has_to_be_forced(production: Draft, size: tuple[int, int]) -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        prepared = await looked(pilot, screen)
        assert prepared.refusals == ()
        text = told(screen)
        for row in ("student weights", "gradients", "AdamW moments", "teacher weights", "student activations"):
            assert row in text
        assert "✘  memory: " in text
        assert "too little memory: " in status(screen)
        await pilot.press("enter")
        assert isinstance(rig.screen, ConfirmScreen)
        assert "GiB needed" in told(rig.screen)
        await pilot.press("enter")  # No has the focus
        assert rig.screen is screen
        assert rig.jobs == []
        await pilot.press("enter", "y")
        await until(pilot, lambda: isinstance(rig.focused, Input), "the question for a reason")
        assert "without a passed smoke" in " ".join(told(rig.screen).split())
        await pilot.press("enter")  # no reason, no start
        await pilot.press(*"why", "enter")
        await until(pilot, lambda: rig.jobs, "a forced start")

    [job] = on_screen(steps, draft=production, size=size).jobs
    assert job.overrides == ("room",)
    assert job.no_gate == "why"
    assert job.force
    assert job.config.mode == "train"


def test_enough_room_asks_nothing_and_overrides_nothing(production: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "free_memory", lambda: 1 << 60)
    monkeypatch.setattr(room_module, "free_disk", lambda directory: None)
    prepared = prepare(production, Path("evidence"), {})
    assert prepared.room is not None
    assert prepared.room.shortages == []
    text = prepared_text(prepared, 120).plain
    assert "✔  memory: " in text
    assert "free is not known" in text
    assert "bytes, float32" in text


# What is shown of the values


def test_values_that_differ_come_first_each_beside_its_default() -> None:
    config = load_config(template="builtin", sets=["student.layers=null", "train.steps=60000"])
    found = {value.key: value for value in values(config)}
    assert found["train.steps"].text == "60,000"
    assert found["train.steps"].default == "50,000"
    assert found["train.learning_rate"].text == "0.006"
    assert not found["distill.alpha"].differs
    assert found["teacher.path"].default is None
    assert found["data.limit_bytes"].differs
    text = prepared_text(prepare(Draft(sets="train.steps=60000"), Path("evidence"), {}), 100).plain
    first, _, rest = text.partition("Values at their default")
    assert "60,000   default 50,000" in first
    assert "distill.alpha" in rest
    assert "distill.alpha" not in first


def test_without_a_teacher_there_is_none() -> None:
    sets = "teacher=null distill.alpha=1 smoke.max_steps=12"
    prepared = prepare(Draft(sets=sets), Path("evidence"), {})
    assert prepared.refusals == ()
    assert what(prepared) == "smoke no teacher > builtin:student, at most 1m 00s or 12 steps"
    assert {value.key: value.text for value in prepared.values}["teacher"] == "null"


@settings(max_examples=30, deadline=None)
@given(st.integers(30, 200), st.sampled_from(["", "train.stpes=3", "data.path=nowhere", "teacher=none"]))
def test_no_line_is_wider_than_its_place(width: int, sets: str) -> None:
    prepared = prepare(Draft(sets=sets), Path("evidence"), {})
    for line in prepared_text(prepared, width).split("\n"):
        assert line.cell_length <= width, line.plain


def test_many_files_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "MAX_FILES", 3)
    for name in "edcba":
        (tmp_path / f"{name}.yaml").touch()
    assert [file.name for file in yaml_files(tmp_path)] == ["a.yaml", "b.yaml", "c.yaml"]


# The screen itself


@pytest.mark.parametrize("size", [*SIZES, (200, 60), (34, 9)])
def test_everything_can_be_reached_at_every_size(size: tuple[int, int]) -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await looked(pilot, screen)
        for part in ("#start", "#status"):
            assert screen.region.contains_region(screen.query_one(part).region), part
        for _ in range(7):
            await pilot.press("tab")
            focused = screen.focused
            assert focused is not None
            if focused.id != "details":
                await until(pilot, lambda f=focused: screen.can_view_partial(f), f"{focused}")  # type: ignore[misc]
        await pilot.press("v")
        await until(pilot, lambda: screen.query_one("#details").region.y < size[1] - 3, "the details in sight")

    on_screen(steps, size=size)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[1]])
def test_details_are_scrolled_with_the_keys_and_left_again(size: tuple[int, int]) -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await looked(pilot, screen)
        await pilot.press("v")
        details = screen.query_one("#details")
        assert screen.focused is details
        scrolled = details if size[0] >= 76 else screen.query_one("#body")
        await pilot.press("end")
        await until(pilot, lambda: scrolled.scroll_y == scrolled.max_scroll_y > 0, "the end")
        await pilot.press("v")
        assert screen.focused is screen.query_one(SourceList)

    on_screen(steps, size=size)


def test_escape_leaves_a_line_first_and_then_the_screen() -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await pilot.press("o")
        await pilot.press("q", "escape")
        assert screen.query_one("#set", Input).value == "q"
        assert rig.screen is screen
        await pilot.press("escape")
        assert rig.screen is not screen

    on_screen(steps)


def test_help_opens_from_within_a_line() -> None:
    async def steps(rig: Rig, pilot: Pilot[None], screen: NewRunScreen) -> None:
        await pilot.press("o", "f1")
        assert isinstance(rig.screen, HelpScreen)

    on_screen(steps)
