"""An evaluation on the screen and in everything that is written of it: the score, and first whether it is believed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answer_runs import broken_evaluation, evaluated, evaluating, held_out_evaluation
from click.testing import CliRunner
from textual.pilot import Pilot

from console.answer_text import read_answer
from console.app import KdConsoleApp
from console.cli import cli
from console.differences import differences
from console.findings.rules import SEVERE, find
from console.read_row import exact_row, quick_row
from console.row_filter import parse_query
from console.run_reader import RunReader
from console.scored import score
from console.screens.dashboard import Dashboard
from console.screens.run import RunScreen
from console.widgets.score import ScorePane
from dispatch.evidence import open_evidence
from engine.problems import COMPLETIONS
from tests.console.app_rig import MIDDLE, NOW, WIDE, frozen, in_app, listed, said
from tests.console.desk_app import shown, until
from tests.console.run_dirs import good_train

FIGURE = re.compile(r"pass@1 [0-9]")
"""What a score looks like."""


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with frozen(monkeypatch):
        yield


def written(*arguments: str) -> str:
    """What a command prints."""
    found = CliRunner().invoke(cli, arguments)
    assert "Traceback" not in found.output, found.output
    return found.output


def looked(path: Path, size: tuple[int, int], *keys: str) -> str:
    """The screen of a past evaluation, after some keys."""
    pictures: list[str] = []

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await pilot.pause()
        for key in keys:
            await pilot.press(key)
        await until(pilot, lambda: "reading …" not in shown(app), "the answer")
        pictures.append(shown(app))

    in_app(body, path.parent, size=size, run=path)
    return pictures[0]


# The screen


@pytest.mark.parametrize("size", [WIDE, MIDDLE], ids=["wide", "middle"])
def test_the_first_thing_seen_is_the_score_and_that_it_holds(tmp_path: Path, size: tuple[int, int]) -> None:
    screen = looked(evaluated(tmp_path / "evidence"), size)
    lines = screen.splitlines()
    frame = next(number for number, line in enumerate(lines) if "Score  ✔ controls hold" in line)
    assert " pass@1 40.2 % " in lines[frame + 1]
    assert "66 of 164 problems solved" in lines[frame + 1]
    assert "✔ empty 0  ✔ pass 0  ✔ constant 0  ✔ canonical 1.0" in screen
    assert "pass@1 40.2 %" in "\n".join(lines[:3])
    assert "HumanEval/1  ▣ memory" in screen


@pytest.mark.parametrize("size", [WIDE, MIDDLE], ids=["wide", "middle"])
def test_controls_that_are_off_are_seen_first_and_no_score_is(tmp_path: Path, size: tuple[int, int]) -> None:
    screen = looked(broken_evaluation(tmp_path / "evidence"), size)
    assert "✘ NO SCORE: this evaluation cannot be believed" in screen
    assert "✘ empty 0.1524, must be 0" in screen
    assert "score UNKNOWN" in "\n".join(screen.splitlines()[:3])
    assert not FIGURE.search(screen)


def test_one_that_goes_on_shows_how_far_it_is_and_the_score_so_far(tmp_path: Path) -> None:
    path = evaluating(tmp_path / "evidence", NOW - 1, 60)
    screen = looked(path, WIDE)
    assert " pass@1 40.0 % so far   24 of 60 judged problems solved" in screen
    assert "60 of 164 programs" in screen
    assert screen.count("·") > 100
    early = looked(evaluating(tmp_path / "evidence", NOW - 1), WIDE)
    assert "the controls hold; no answer is judged yet" in early
    assert "82 of 164 completions" in early
    assert "phase left" in early
    assert "ETA" not in early


def test_an_evaluation_on_the_held_out_part_shows_its_figures(tmp_path: Path) -> None:
    screen = looked(held_out_evaluation(tmp_path / "evidence"), WIDE)
    for name, value in (("held-out loss", "2.8714"), ("perplexity", "17.6617"), ("KL to the teacher", "0.9377")):
        assert re.search(rf"{name} +{value}", screen), screen
    assert "41.2 %" in screen


def test_arrows_choose_a_problem_and_enter_shows_its_answer_cleaned(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "evidence", 30)

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        async def after(*keys: str) -> str:
            await pilot.press(*keys)
            await until(pilot, lambda: "reading …" not in shown(app), "the answer")
            return shown(app)

        await pilot.pause()
        assert "HumanEval/4  ✔ passed" in await after("home", "right", "right", "right", "right")
        answer = await after("home", "right", "enter")
        assert "HumanEval/1  answer 0  ▣ memory: MemoryError" in answer
        assert "# [red]not markup[/]" in answer
        assert "[31m x + 1" in answer
        assert "\x1b" not in answer
        assert "HumanEval/2  answer 0" in await after("right")
        assert "does not have answer 1 to it" in await after("shift+right")
        assert "Score  ✔ controls hold" in await after("enter")

    in_app(body, path.parent, size=WIDE, run=path)


def test_a_thousand_problems_find_room_and_the_cursor_stays_in_sight(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "evidence", 1_000)
    assert "HumanEval/999" in looked(path, MIDDLE, "end")


def test_a_training_has_its_chart_and_an_evaluation_the_key_of_its_score(tmp_path: Path) -> None:
    def panes(path: Path) -> tuple[bool, bool, str]:
        found: list[tuple[bool, bool, str]] = []

        async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
            await pilot.pause()
            await pilot.press("2", "1")
            screen = app.screen
            assert isinstance(screen, Dashboard)
            scores = screen.query_one(ScorePane)
            found.append((screen.chart.display, scores.display, str(screen.focused.id if screen.focused else "")))

        in_app(body, path.parent, size=WIDE, run=path)
        return found[0]

    assert panes(good_train(tmp_path / "evidence", 40)) == (True, False, "chart")
    assert panes(evaluated(tmp_path / "evidence", 20)) == (False, True, "score")


def test_r_says_which_command_goes_on_with_generated_code_and_asks_nothing(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "evidence", 20)
    (path / "problems.jsonl").touch()

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, RunScreen)
        await until(pilot, lambda: screen.check_action("resume", ()) is True, "the key")
        await pilot.press("r")
        await until(pilot, lambda: said(app), "the answer")
        assert f"kdconsole evaluate --resume {path.name} --run-generated-code" in said(app)[0]
        assert app.screen is screen

    in_app(body, path.parent, size=WIDE, run=path)


def test_e_writes_every_problem_as_csv(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "evidence", 20)

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await pilot.pause()
        await pilot.press("e")
        await until(pilot, lambda: said(app), "what was written")

    in_app(body, path.parent, size=WIDE, run=path)
    [table] = tmp_path.glob("*-score*.csv")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 20
    assert (rows[1]["task"], rows[1]["answers"], rows[1]["memory"]) == ("HumanEval/1", "1", "1")
    assert (tmp_path / table.with_suffix(".txt").name).read_text().startswith(" pass@1 40.0 %")


def test_home_shows_the_score_in_place_of_a_loss_and_the_phase_of_the_campaign(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    for make in (evaluated, broken_evaluation, held_out_evaluation):
        make(evidence)
    lines: list[str] = []

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await listed(app, pilot)
        await pilot.pause()
        lines.extend(shown(app).splitlines())

    in_app(body, evidence, size=(160, 40))
    rows = [line for line in lines if "-evaluate-" in line and "evidence/" not in line]
    assert len(rows) == 3
    assert all(re.search(r"evaluate +5 ", line) for line in rows), rows
    assert sum("pass@1 40.2 %" in line for line in rows) == 1
    assert sum("UNKNOWN" in line for line in rows) == 1
    assert sum("loss 2.8714" in line for line in rows) == 1


def test_a_quick_row_never_has_a_score_and_an_exact_one_never_of_a_broken_one(tmp_path: Path) -> None:
    for make, told in ((evaluated, "pass@1 40.2 %"), (broken_evaluation, "UNKNOWN")):
        evidence = open_evidence(make(tmp_path / "evidence"))
        assert quick_row(evidence, NOW).score == ""
        row = exact_row(RunReader(evidence.path).read(), NOW)
        assert (row.score, row.phase, row.mode, row.target) == (told, "5", "evaluate", None)
        assert parse_query("mode:prepare").tests[0](row, NOW) is False


# What is written


def test_everything_that_is_written_of_a_broken_evaluation_says_so_and_has_no_score(tmp_path: Path) -> None:
    path = str(broken_evaluation(tmp_path / "evidence"))
    good = str(evaluated(tmp_path / "evidence"))
    for command in (
        ["--headless", "review", path],
        ["report", path, "--format", "md", "-o", "-"],
        ["report", path, "--format", "html", "-o", "-"],
        ["--headless", "compare", path, str(broken_evaluation(tmp_path / "evidence", 20))],
    ):
        text = written(*command)
        assert "UNKNOWN" in text, command
        assert not FIGURE.search(text), command
        assert re.search(r"pass@1 .*40.2 %", written(*[good if each == path else each for each in command])), command
    told = json.loads(written("--headless", "review", path, "--json"))
    assert (told["evaluation"]["believed"], told["evaluation"]["pass_at"]) == (False, {})
    told = json.loads(written("--headless", "review", good, "--json"))
    assert told["evaluation"]["pass_at"]["1"] == pytest.approx(66 / 164)
    assert len(told["evaluation"]["problems"]) == 164


def test_a_picture_of_a_report_has_the_score(tmp_path: Path) -> None:
    text = written("report", str(evaluated(tmp_path / "evidence")), "--format", "svg", "-o", "-")
    assert "pass@1 40.2 %" in text


def test_a_control_that_is_off_is_a_severe_finding_that_tells_its_verdict(tmp_path: Path) -> None:
    found = find(RunReader(broken_evaluation(tmp_path / "evidence")).read())
    [off] = [each for each in found if each.kind == "control-off"]
    assert off.severity == SEVERE
    assert off.verdict == "F-EVALUATE-CONTROL-001"
    assert "empty scored 0.1524, must be 0" in off.text
    assert not [each for each in found if each.kind == "verdict-failed"]
    assert not [e for e in find(RunReader(evaluated(tmp_path / "evidence")).read()) if e.kind.startswith("control")]


def test_two_evaluations_side_by_side_and_what_one_alone_solves(tmp_path: Path) -> None:
    one, two = evaluated(tmp_path / "evidence", 20), evaluated(tmp_path / "evidence", 20, 2)
    broken = broken_evaluation(tmp_path / "evidence", 20)
    runs = [RunReader(path).read() for path in (one, two, broken)]
    sections = {each.title: each for each in differences(runs, NOW)}
    scores = {line.label: [cell.text for cell in line.cells] for line in sections["evaluation"].lines}
    assert scores["pass@1"] == ["40.0 %", "40.0 %", "? UNKNOWN"]
    assert scores["problems solved"] == ["8 of 20", "16 of 20", "–"]
    assert scores["control empty"][2] == "✘ OFF 0.1524"
    problems = sections["problems, solved by one and not by another"]
    assert len(problems.lines) == 8
    assert [cell.text for cell in problems.lines[0].cells] == ["✘ memory", "✔ solved 1/2", "–"]
    assert "solved by one alone" in problems.note
    assert "losses, nats per token" not in sections
    same = {each.title: each for each in differences(runs[:1] * 2, NOW)}
    assert same["problems, solved by one and not by another"].note == "the same problems are solved"


def test_an_evaluation_whose_contract_is_lost_is_read_and_judged_by_none(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "evidence", 20)
    (path / "contract.yaml").unlink()
    loaded = RunReader(path).read()
    assert loaded.problem == ""
    assert score(loaded.state).text.startswith("pass@1 40.0 %")


def test_the_answers_as_csv(tmp_path: Path) -> None:
    text = written(
        "report", str(evaluated(tmp_path / "evidence", 20)), "--format", "csv", "--series", "answers", "-o", "-"
    )
    rows = list(csv.DictReader(io.StringIO(text)))
    assert sum(int(row["passed"]) for row in rows) == 8


# One answer


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is not here"),
        (b"", "does not have answer 0"),
        (b'{"task": "A", "sample"\nnot json\n\xff\n', "does not have answer 0"),
        (b'{"task": "A", "sample": 1, "completion": "x"}\n', "does not have answer 0"),
    ],
)
def test_an_answer_that_is_not_there_is_told(tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / COMPLETIONS).write_bytes(content)
    assert told in read_answer(tmp_path, "A", 0).problem


def test_an_answer_is_cleaned_and_cut(tmp_path: Path) -> None:
    line = {"task": "A", "sample": 0, "completion": "\x1b[2J\u202eab\n" * 5_000, "tokens": 7, "finish": "length"}
    (tmp_path / COMPLETIONS).write_text(json.dumps(line) + "\n")
    found = read_answer(tmp_path, "A", 0)
    assert (found.tokens, found.finish, found.problem) == (7, "length", "")
    assert len(found.lines) == 1_000
    assert found.cut > 0
    assert not {"\x1b", "\u202e"} & set("".join(found.lines))
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / COMPLETIONS).unlink()
    (tmp_path / COMPLETIONS).symlink_to(tmp_path / "elsewhere")
    assert COMPLETIONS in read_answer(tmp_path, "A", 0).problem
