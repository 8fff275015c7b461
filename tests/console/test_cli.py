"""The command line as its user meets it: usage, refusals before anything starts, exit codes."""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path

import pytest

from tests.console_rig import Desk

COMMANDS = [
    *([], ["smoke"], ["train"], ["attach"], ["stop"], ["runs"], ["prepare"], ["import"]),
    *(["evaluate"], ["publish"], ["convert"]),
    *(["config"], ["config", "check"], ["config", "show"], ["config", "init"]),
]
CONFIG = "teacher: builtin:teacher\nstudent: builtin:student\ndata: {path: builtin:stdlib}\n"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_each_command_exits_0_and_fits_80_columns(desk: Desk, command: list[str]) -> None:
    outcome = desk.call(*command, "--help")
    assert outcome.rc == 0, outcome.said
    assert outcome.out.startswith("Usage: ")
    assert outcome.err == ""
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_help_tells_the_exit_codes(desk: Desk) -> None:
    lines = desk.call("smoke", "--help").out.splitlines()
    codes = [int(line.split()[0]) for line in lines[lines.index("  Exit codes:") + 1 :] if re.match(r" +\d", line)]
    assert codes == [0, 1, 2, 3, 4, 5, 130]


def test_version_is_the_one_of_the_package(desk: Desk) -> None:
    outcome = desk.call("--version")
    assert outcome.rc == 0
    assert metadata.version("kdconsole") in outcome.out


@pytest.mark.parametrize("arguments", [[], ["--readonly"], ["--evidence", "nowhere"]])
def test_the_dashboard_without_a_terminal_says_what_to_do(desk: Desk, arguments: list[str]) -> None:
    outcome = desk.call(*arguments)
    assert outcome.rc == 2
    assert "the dashboard needs a terminal; without one: kdconsole --headless COMMAND" in outcome.err


def test_headless_needs_a_command(desk: Desk) -> None:
    outcome = desk.call("--headless")
    assert outcome.rc == 2
    assert "smoke, train or attach" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["--headless", "smoke", "--maxsteps", "3"], "--max-steps"),
        (["--headless", "smoke", "a.yaml", "b.yaml"], "unexpected extra argument"),
        (["--headless", "smoke", "--max-steps"], "requires an argument"),
        (["--headless", "train"], "give either CONFIG or --resume RUN"),
        (["--headless", "train", "--resume", "x", "--max-steps", "5"], "leave out --max-steps"),
        (["--headless", "train", "--resume", "x", "--set", "train.steps=5"], "leave out --set"),
        (["--headless", "attach"], "Missing argument 'RUN'"),
        (["stop", "x", "--grace", "-1"], "--grace"),
        (["runs", "extra"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(desk: Desk, arguments: list[str], words: str) -> None:
    outcome = desk.call(*arguments)
    assert outcome.rc == 2, outcome.said
    assert words in outcome.err
    assert outcome.out == ""
    assert not desk.evidence.exists()


@pytest.mark.parametrize("arguments", [["smoke"], ["train", "config.yaml"], ["attach", "x"]])
def test_without_a_screen_the_hint_is_to_go_headless(desk: Desk, arguments: list[str]) -> None:
    outcome = desk.call(*arguments)
    assert outcome.rc == 2, outcome.said
    assert f"kdconsole --headless {arguments[0]}" in outcome.err


@pytest.mark.parametrize("value", ["0", "-1", "ten", "1.5", "1e3", "true", "null", ""])
def test_max_steps_that_is_no_positive_integer_is_refused(desk: Desk, value: str) -> None:
    line = desk.call("--headless", "smoke", "--max-steps", value).refused("--max-steps: ")
    assert "expected an integer of at least 1" in line
    assert "smoke.max_steps" not in line


def test_max_steps_of_a_full_run_is_held_to_its_steps_and_named_as_it_was_typed(desk: Desk) -> None:
    desk.write("config.yaml", CONFIG + "train: {steps: 600}\n")
    command = ["--headless", "train", "config.yaml", "--max-steps"]
    desk.call(*command, "0").refused("error: --max-steps: 0: expected an integer of at least 1")
    desk.call(*command, "601").refused("error: --max-steps: 601: expected at most train.steps (600)")


@pytest.mark.parametrize("value", ["0", "-5", "ten", "nan", "inf", "1e400", "null", ""])
def test_a_budget_that_is_no_positive_number_is_refused(desk: Desk, value: str) -> None:
    line = desk.call("--headless", "smoke", "--budget", value).refused("--budget: ")
    assert "expected a number above 0" in line


def test_project_to_that_is_no_positive_integer_is_refused(desk: Desk) -> None:
    desk.call("--headless", "smoke", "--project-to", "0").refused("--project-to: 0: expected an integer")


def test_an_unknown_key_is_refused_with_file_path_and_nearest_key(desk: Desk) -> None:
    desk.write("config.yaml", CONFIG + "distill: {temprature: 3}\n")
    line = desk.call("--headless", "smoke", "config.yaml").refused()
    assert line == "error: config.yaml: distill.temprature: unknown key; did you mean distill.temperature?"


def test_a_variable_is_held_to_the_same_schema(desk: Desk) -> None:
    outcome = desk.call("--headless", "smoke", variables={"KDCONSOLE_TRAIN__STEPS": "-3"})
    outcome.refused("KDCONSOLE_TRAIN__STEPS: -3: expected an integer of at least 1")


def test_a_flag_wins_over_set_and_both_over_the_file(desk: Desk) -> None:
    desk.write("config.yaml", CONFIG + "smoke: {max_steps: 5}\n")
    arguments = ["--headless", "smoke", "config.yaml", "--set", "smoke.max_steps=0", "--max-steps", "-7"]
    desk.call(*arguments).refused("--max-steps: -7")
    desk.call(*arguments[:-2]).refused("--set smoke.max_steps: 0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.yaml"], "missing.yaml: no such file"),
        (["--teacher", "nowhere"], "nowhere: no such directory"),
        (["--student", "builtin:studnet"], "did you mean builtin:student?"),
        (["--teacher", ""], "teacher"),
        (["--contract", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--set", "train.steps"], "train.steps"),
        (["--set", "train.stpes=3"], "did you mean train.steps?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_be_known_before_the_start_is_refused_in_one_line(
    desk: Desk, arguments: list[str], words: str
) -> None:
    desk.call("--headless", "smoke", *arguments).refused(words)


def test_an_error_as_json_is_a_document_too(desk: Desk) -> None:
    outcome = desk.call("--headless", "smoke", "missing.yaml", "--json")
    assert outcome.rc == 2
    document = json.loads(outcome.out)
    assert document["schema"] == "kdconsole.error/1"
    assert document["exit_code"] == 2
    assert document["error"].startswith("missing.yaml: no such file")
    assert outcome.err == f"error: {document['error']}\n"


def test_an_evidence_path_that_is_a_file_is_refused(desk: Desk) -> None:
    file = desk.write("taken", "")
    outcome = desk.call("--headless", "smoke", "--evidence", str(file))
    outcome.refused(str(file), "--evidence DIR")
    assert file.read_text() == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_evidence_directory_without_write_permission_is_refused(desk: Desk) -> None:
    desk.cwd.chmod(0o500)
    desk.call("--headless", "smoke", "--evidence", str(desk.cwd / "evidence")).refused("Permission denied")


def test_an_evidence_directory_in_a_place_that_takes_none_is_refused(desk: Desk) -> None:
    outcome = desk.call("--headless", "smoke", "--evidence", "/proc/evidence")
    assert outcome.rc == 2
    assert "/proc" in outcome.err
    assert "Traceback" not in outcome.err


def test_runs_of_an_empty_place_says_so_and_exits_0(desk: Desk) -> None:
    outcome = desk.call("runs")
    assert (outcome.rc, outcome.out) == (0, "")
    assert "no runs in" in outcome.err
    assert json.loads(desk.call("runs", "--json").out)["runs"] == []


@pytest.mark.parametrize("command", [["--headless", "attach"], ["stop"]])
@pytest.mark.parametrize("name", ["2026", "./2026", "../etc"])
def test_a_run_that_does_not_exist_is_refused(desk: Desk, command: list[str], name: str) -> None:
    desk.call(*command, name).refused(name.removeprefix("./"))
