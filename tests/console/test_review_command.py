"""`kdconsole review`: what it is given, what it prints, and its exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from console.cli import COMMANDS, cli
from console.review_command import Progress
from engine.errors import KdError
from tests.console import run_dirs as dirs
from tests.old_evidence import SCENES, step

ROOT = Path(__file__).parents[2]


def call(*arguments: str | Path, headless: bool = True) -> Result:
    words = ["--headless"] if headless else []
    return CliRunner().invoke(cli, [*words, "review", *map(str, arguments)])


def spoken(outcome: Result) -> str:
    """The one message of a command that could not do it."""
    assert isinstance(outcome.exception, KdError)
    assert outcome.exception.exit_code == 2
    return str(outcome.exception)


def test_it_is_a_command_of_the_console() -> None:
    assert COMMANDS["review"] == "console.review_command:review_command"


@pytest.mark.parametrize(
    ("build", "code"),
    [(dirs.good_train, 0), (dirs.failed_verdict_run, 1), (dirs.lost_run, 5), (dirs.crashed_run, 5), (dirs.live_run, 5)],
)
def test_the_exit_code_of_one_run_is_that_run_s(build: Callable[[Path], Path], code: int, tmp_path: Path) -> None:
    outcome = call(build(tmp_path))
    assert outcome.exit_code == code
    assert f"exit code {code}: " in " ".join(outcome.output.split())


def test_a_run_can_be_told_by_its_id_or_the_beginning_of_it(tmp_path: Path) -> None:
    path = dirs.good_smoke(tmp_path)
    for name in (path.name, path.name[:-3]):
        outcome = call(name, "--evidence", tmp_path)
        assert outcome.exit_code == 0
        assert outcome.output.startswith(path.name)


def test_a_log_and_a_directory_of_the_predecessor_are_read(tmp_path: Path) -> None:
    old = SCENES["asked-50-ran-62"](tmp_path / "old")
    for path in (old, old / "launch.log"):
        outcome = call(path)
        assert outcome.exit_code == 0
        assert "7.6746  7.2036" in outcome.output


def test_a_folder_of_one_run_is_that_run_and_of_many_a_table(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    dirs.failed_verdict_run(tmp_path / "one")
    one = call(tmp_path / "one")
    assert (one.exit_code, "verdicts\n" in one.output) == (1, True)
    dirs.good_train(tmp_path / "one")
    SCENES["panic"](tmp_path / "one" / "old" / "panic")
    many = call(tmp_path / "one")
    assert many.exit_code == 0
    table = many.output[many.output.rindex("run  ") :].splitlines()
    assert len(table) == 4
    assert [row.split()[-1] for row in table[1:]].count("crash") == 1


def test_the_same_run_twice_is_one_run(tmp_path: Path) -> None:
    path = dirs.good_smoke(tmp_path)
    assert json.loads(call(path, path, tmp_path, "--json").output)["schema"] == "kdconsole.review/1"


def test_runs_of_one_name_are_told_apart_in_the_table(tmp_path: Path) -> None:
    for place in ("a", "b"):
        SCENES["smoke"](tmp_path / place / "old")
    rows = call(tmp_path / "a", tmp_path / "b").output.splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["a/old", "b/old"]


def test_json_is_one_document_and_needs_no_screen(tmp_path: Path) -> None:
    path = dirs.good_smoke(tmp_path)
    outcome = call(path, "--json", headless=False)
    told = json.loads(outcome.output)
    assert outcome.exit_code == 0
    assert (told["schema"], told["status"], told["exit_code"]) == ("kdconsole.review/1", "COMPLETED", 0)
    other = SCENES["smoke"](tmp_path / "old")
    several = json.loads(call(path, other, "--json").output)
    assert (several["schema"], len(several["runs"]), several["unread"]) == ("kdconsole.reviews/1", 2, [])
    assert several["runs"][0].keys() == several["runs"][1].keys() == told.keys()


def test_what_is_not_there_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no such file or directory" in spoken(call(tmp_path / "nothing"))
    assert str(tmp_path / "empty") in spoken(call(tmp_path / "empty"))
    told = spoken(call(tmp_path / "nothing", tmp_path / "empty"))
    assert told.startswith("nothing to review")
    assert "nothing'" in told
    assert str(tmp_path / "empty") in told
    as_json = call(tmp_path / "empty", "--json")
    assert json.loads(as_json.output)["schema"] == "kdconsole.error/1"


def test_of_several_the_others_are_reviewed_where_one_cannot_be_read(tmp_path: Path) -> None:
    good, junk = dirs.good_smoke(tmp_path / "good"), dirs.good_train(tmp_path / "junk")
    (junk / "events.jsonl").write_bytes(b"junk\n")
    outcome = call(good, junk, tmp_path / "nothing")
    assert outcome.exit_code == 2
    assert "✔ COMPLETED" in outcome.output
    assert "✘ UNREADABLE" in outcome.output
    told = json.loads(call(good, junk, tmp_path / "nothing", "--json").output)
    assert [each["status"] for each in told["runs"]] == ["COMPLETED", "UNREADABLE"]
    assert [Path(each["path"]).name for each in told["unread"]] == ["nothing", junk.name]


def test_without_a_terminal_it_says_how_to_do_without(tmp_path: Path) -> None:
    outcome = call(dirs.good_smoke(tmp_path), headless=False)
    assert outcome.exit_code == 2
    assert "kdconsole --headless review" in outcome.output


def test_the_app_is_opened_on_what_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the screen is replaced: a terminal is what a test has not."""
    opened: dict[str, object] = {}

    def screen(context: object, evidence: Path, **first: object) -> None:
        opened.update(first, evidence=evidence)

    monkeypatch.setattr("console.review_command.need_terminal", lambda context: None)
    monkeypatch.setattr("console.review_command.open_screen", screen)
    path, old = dirs.good_smoke(tmp_path), SCENES["smoke"](tmp_path / "old")
    assert call(path.name, old, tmp_path, "--evidence", tmp_path, headless=False).exit_code == 0
    assert opened == {"evidence": tmp_path, "review": [path, old, tmp_path]}


def test_no_line_ends_in_blanks_and_nothing_is_coloured_in_a_file(tmp_path: Path) -> None:
    output = call(dirs.spike_run(tmp_path)).output
    assert "\x1b" not in output
    assert [line for line in output.splitlines() if line != line.rstrip()] == []


def test_help_says_what_the_exit_code_is() -> None:
    told = call("--help")
    assert "is that run's, as attach gives it" in " ".join(told.output.split())
    assert "kdconsole --headless review evidence --json" in told.output


# Progress


def ticking(*times: float) -> Progress:
    moments = iter(times)
    return Progress("big.log", False, lambda: next(moments))


def test_what_is_read_at_once_is_told_of_with_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ticking(0.0, 0.1, 0.4)
    progress.tell(1, 10)
    progress.tell(9, 10)
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_big_file_is_told_of_every_two_seconds_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ticking(0.0, 0.6, 1.0, 2.5, 2.7, 9.0)
    for offset in range(1, 6):
        progress.tell(offset * 10**8, 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "reading big.log: 100 of 1,000 MB (10%)",
        "reading big.log: 400 of 1,000 MB (40%)",
        "reading big.log: 500 of 1,000 MB (50%)",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("x", True, iter([0.0, 50.0]).__next__)
    progress.tell(1, 2)
    assert capsys.readouterr().err == ""


# As a process


def kdconsole(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "console", *map(str, arguments)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_while_a_big_log_is_read_ends_it_with_130_and_no_traceback(tmp_path: Path) -> None:
    log = tmp_path / "big.log"
    log.write_text("".join(f"{step(n, 900, 5.0 - n / 1e3)}\n" for n in range(1, 201)))
    os.truncate(log, 1 << 38)  # more than can be read in a test, and none of it on the disk
    process = kdconsole("--headless", "review", log)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()  # it says that it reads, so it is in the middle of it
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert re.match(r"reading big\.log: \d", first)
    assert (process.returncode, out) == (130, "")
    assert "interrupted" in rest
    assert "Traceback" not in rest


def test_a_reader_that_goes_away_gets_no_traceback_and_the_exit_code_stands(tmp_path: Path) -> None:
    path = dirs.failed_verdict_run(tmp_path)
    process = kdconsole("--headless", "review", path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 1
