"""`kdconsole compare`: the Compare screen's table without a screen, for every kind of evidence."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from console.cli import cli
from console.differences import differences
from console.run_reader import LoadedRun, load_run
from console.side_by_side import Line
from tests import old_evidence as old
from tests.console.run_dirs import READY, good_smoke, good_train, nan_run, resumed_run, spike_run
from tests.console.terminal_rig import Terminal
from tests.console_rig import ROOT, Desk

ESCAPE = "\x1b]0;OWNED\x07\x1b[31m\u202e"


def call(*arguments: object, headless: bool = True) -> Result:
    given = ["--headless"] if headless else []
    return CliRunner().invoke(cli, [*given, "compare", *map(str, arguments)], standalone_mode=False)


def refused(*arguments: object, headless: bool = True) -> str:
    result = call(*arguments, headless=headless)
    assert result.exception is not None, result.output
    return str(result.exception)


def lines_of(*runs: LoadedRun) -> dict[str, Line]:
    return {line.label: line for section in differences(runs, 0.0) for line in section.lines}


def texts(line: Line) -> list[str]:
    return [cell.text for cell in line.cells]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of ours and the predecessor's, under names."""
    base = tmp_path_factory.mktemp("compare")
    return {
        "good": good_train(base, name="good"),
        "nan": nan_run(base),
        "smoke": good_smoke(base),
        "spike": spike_run(base),
        "resumed": resumed_run(base),
        "old": old.SCENES["smoke"](base / "old"),
        "stated": old.SCENES["stated-verdicts"](base / "stated"),
        "epochs": old.SCENES["epochs"](base / "epochs"),
        "bare": old.SCENES["bare-log"](base / "bare") / "run.log",
        "manifest": old.SCENES["manifest-only"](base / "manifest"),
    }


# What is printed


def test_what_differs_is_printed_and_what_does_not_is_counted(runs: dict[str, Path]) -> None:
    result = call(runs["good"], runs["nan"])
    assert result.exit_code == 0, result.output
    shown = result.output
    [status] = [line for line in shown.splitlines() if line.startswith("status")]
    assert "■ COMPLETED" in status
    assert "≠ ✘ FAILED" in status
    [judged] = [line for line in shown.splitlines() if line.startswith("F-FINITE-001")]
    assert judged.split() == ["F-FINITE-001", "✔", "PASS", "≠", "✘", "FAIL"]
    assert "precision" not in shown
    assert "F-DISTILL-KDSTEP-001" not in shown
    assert "--all shows them" in shown


def test_all_shows_every_line(runs: dict[str, Path]) -> None:
    shown = call(runs["good"], runs["nan"], "--all").output
    assert "F-DISTILL-KDSTEP-001" in shown
    assert "precision" in shown
    assert "--all shows them" not in shown


def test_losses_at_equal_steps_and_tokens_are_shown_where_they_agree_too(runs: dict[str, Path]) -> None:
    shown = call(runs["good"], runs["resumed"]).output
    assert "train at step 200, mean of 10" in shown
    assert "train at 204,800 tokens" in shown


@pytest.mark.parametrize("columns", [100, 140])
def test_a_line_of_the_table_is_no_wider_than_the_terminal(runs: dict[str, Path], columns: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "console", "--headless", "compare", *map(str, runs.values())],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm-256color"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in done.stdout.splitlines()]
    assert max(map(len, plain)) <= columns
    assert any(line.startswith("status") for line in plain)


def test_more_than_three_runs_are_shown_in_blocks_that_begin_with_the_first(runs: dict[str, Path]) -> None:
    shown = call(*runs.values()).output
    headers = [line for line in shown.splitlines() if line.startswith("   ") and " 1 good" in line]
    assert len(headers) == 5
    assert [f" {number} " in "".join(headers) for number in range(1, 11)] == [True] * 10


def test_json_and_csv_hold_every_line_and_every_digit(runs: dict[str, Path]) -> None:
    told = json.loads(call(runs["good"], runs["old"], "--json", headless=False).output)
    assert told["schema"] == "kdconsole.compare/1"
    assert [run["kind"] for run in told["runs"]] == ["run", "predecessor"]
    lines = {line["label"]: line for section in told["sections"] for line in section["lines"]}
    assert lines["train, last"]["values"][1] == 7.2036
    assert lines["train ce, last"]["values"][1] is None
    rows = {row[1]: row for row in csv.reader(io.StringIO(call(runs["good"], runs["old"], "--csv").output))}
    last = load_run(runs["good"]).state.steps.column("loss")[-1]
    assert float(rows["train, last"][2]) == last
    assert rows["train ce, last"][3] == ""


def test_evidence_ids_are_those_of_sha256sums(runs: dict[str, Path], tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    for file in runs["good"].iterdir():
        (one / file.name).write_bytes(file.read_bytes())
    (one / "SHA256SUMS").write_text("0" * 64 + "  config.yaml\n")
    line = lines_of(load_run(one), load_run(runs["nan"]))["evidence id"]
    assert [cell.value for cell in line.cells] == [
        hashlib.sha256((one / "SHA256SUMS").read_bytes()).hexdigest(),
        None,
    ]


# Evidence that tells less


@pytest.mark.parametrize("name", old.SCENES)
def test_every_old_directory_can_be_compared_and_shows_no_nan(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    scene = old.SCENES[name](tmp_path / "scene")
    result = call(runs["good"], scene, "--all")
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output.lower().replace("nan_", "")
    assert " inf" not in result.output


def test_of_an_old_log_first_and_last_loss_are_those_that_its_end_states(runs: dict[str, Path], tmp_path: Path) -> None:
    every_tenth = load_run(old.SCENES["every-tenth"](tmp_path / "t"))
    lines = lines_of(load_run(runs["good"]), every_tenth)
    assert every_tenth.state.steps.column("loss")[0] != 7.6746
    assert [lines[f"train, {part}"].cells[1].value for part in ("first", "last")] == [7.6746, 7.2036]
    last_line = load_run(old.SCENES["last-line-only"](tmp_path / "l"))
    assert texts(lines_of(last_line)["train, first"]) == ["7.675"]
    assert texts(lines_of(last_line)["steps"]) == ["62 of 50"]


def test_what_an_old_log_does_not_tell_is_a_dash(runs: dict[str, Path]) -> None:
    lines = lines_of(load_run(runs["good"]), load_run(runs["old"]))
    for label in ("train ce, last", "train kd, last", "in steps", "attempts", "tokens/s", "precision"):
        assert texts(lines[label])[1] == "–", label
    assert texts(lines["took"])[1] == "2m 03s"
    assert lines["steps/s"].cells[1].value == 0.51
    assert texts(lines["projection"])[1] == "27h 29m"


def test_at_equal_tokens_stand_only_runs_that_tell_their_tokens(runs: dict[str, Path]) -> None:
    good, spike, bare = (load_run(runs[name]) for name in ("good", "spike", "bare"))
    assert not [label for label in lines_of(good, bare) if label.endswith("tokens")]
    lines = lines_of(good, spike, bare)
    assert texts(lines["train at 204,800 tokens"])[2] == "–"
    assert texts(lines["held-out by 204,800 tokens"])[2] == "–"


def test_at_equal_steps_stand_only_runs_that_have_steps_and_epochs_are_none(runs: dict[str, Path]) -> None:
    good, bare, epochs, manifest = (load_run(runs[name]) for name in ("good", "bare", "epochs", "manifest"))
    lines = lines_of(good, bare, epochs, manifest)
    cells = lines["train at step 124, mean of 10"].cells
    assert cells[0].value == pytest.approx(good.state.steps.column("loss")[114:124].mean())
    assert cells[1].value == pytest.approx(bare.state.steps.column("loss")[114:124].mean())
    assert [cell.text for cell in cells[2:]] == ["–", "–"]
    notes = " ".join(section.note for section in differences([good, bare, epochs], 0.0))
    assert "one counts steps and another epochs" in notes
    assert "temperature or alpha differ" not in notes, "nobody says these of a log"
    assert "nothing says which texts the losses of run.log, phase3-smoke are of" in notes


def test_verdicts_say_what_is_behind_them(runs: dict[str, Path]) -> None:
    lines = lines_of(load_run(runs["good"]), load_run(runs["stated"]))
    assert texts(lines["F-DISTILL-PIPELINE-001"]) == ["✔ PASS", "✔ PASS (stated, derived)"]
    assert texts(lines["FT-SMOKE-002"]) == ["–", "✘ FAIL (stated)"]
    assert texts(lines["all of them"])[1] == "3 PASS, 1 FAIL"
    notes = {section.title: section.note for section in differences([load_run(runs["stated"])], 0.0)}
    assert "derived: judged anew" in notes["verdicts"]


def test_an_old_manifest_is_compared_key_by_key_and_its_silence_is_no_difference(runs: dict[str, Path]) -> None:
    section = next(
        s
        for s in differences([load_run(runs["good"]), load_run(runs["old"])], 0.0)
        if s.title.startswith("configuration")
    )
    told = {line.label: texts(line) for line in section.lines}
    assert told["train.batch"] == ["8", "16"]
    assert told["train.learning_rate"] == ["0.006", "1.5e-05"]
    assert "distill.alpha" not in told, "both have 0.3"
    assert "train.seed" not in told, "nobody says that of the old one"


def test_inputs_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    one, other = load_run(runs["good"]), load_run(runs["spike"])
    assert one.manifest is not None

    def with_inputs(run: LoadedRun, **inputs: str) -> LoadedRun:
        return replace(run, manifest=msgspec.structs.replace(run.manifest, inputs=inputs))  # type: ignore[type-var]

    a = with_inputs(one, teacher="a" * 64, data="b" * 64, tokenizer="e" * 64)
    b = with_inputs(other, teacher="a" * 64, data="c" * 64)
    section = next(s for s in differences([a, b], 0.0) if s.title.startswith("inputs"))
    assert section.note == "the same: teacher; different: data; not known of all: student, tokenizer"
    assert {line.label: texts(line) for line in section.lines}["data"] == ["b" * 12, "c" * 12]


@pytest.mark.parametrize("name", READY)
def test_every_run_of_ours_can_be_compared_with_an_old_one(tmp_path: Path, runs: dict[str, Path], name: str) -> None:
    result = call(READY[name](tmp_path), runs["old"])
    assert result.exit_code == 0, result.output


# What is refused


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_runs_are_refused(runs: dict[str, Path], count: int) -> None:
    assert refused(*[runs["good"]] * count) == f"compare: {count} given; expected at least two different runs"


def test_the_same_run_twice_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(runs["good"])
    assert "only, twice" in refused(runs["good"], tmp_path / "again")


def test_everything_that_cannot_be_read_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    told = refused(tmp_path / "gone", runs["good"], tmp_path / "empty", "no-such-id")
    assert "gone" in told
    assert "empty" in told
    assert "no-such-id" in told


def test_runs_may_be_told_by_the_beginning_of_their_ids(runs: dict[str, Path]) -> None:
    good, spike = (runs[name].name for name in ("good", "spike"))
    result = call(good, spike[:-1], "--evidence", runs["good"].parent)
    assert result.exit_code == 0, result.output


def test_json_and_csv_together_are_refused(runs: dict[str, Path]) -> None:
    assert "either" in refused(runs["good"], runs["nan"], "--json", "--csv")


def test_an_error_is_a_document_too_where_json_is_wanted(tmp_path: Path) -> None:
    result = call(tmp_path / "gone", tmp_path / "lost", "--json")
    assert json.loads(result.output)["schema"] == "kdconsole.error/1"


def test_hostile_names_do_not_steer_a_terminal(tmp_path: Path, runs: dict[str, Path]) -> None:
    scene = old.write_old(
        tmp_path / f"x{ESCAPE}",
        logs={"launch.log": old.train_log()},
        manifest=old.manifest(run_name=f"y{ESCAPE}", host=ESCAPE, teacher=ESCAPE, **{f"k{ESCAPE}": ESCAPE}),
    )
    for arguments in ((), ("--json",), ("--csv",)):
        shown = call(runs["good"], scene, *arguments).output
        assert "OWNED" in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown


def test_a_reader_that_goes_away_is_no_error(runs: dict[str, Path]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "console", "--headless", "compare", str(runs["good"]), str(runs["nan"]), "--all"],
            cwd=ROOT,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# The app


def test_without_a_terminal_it_says_how_to_print(runs: dict[str, Path]) -> None:
    assert "kdconsole --headless compare" in refused(runs["good"], runs["nan"], headless=False)


def test_on_a_terminal_it_opens_the_compare_screen(tmp_path: Path, runs: dict[str, Path]) -> None:
    desk = Desk(tmp_path)
    terminal = Terminal(
        ["compare", str(runs["good"]), str(runs["bare"])],
        cwd=desk.cwd,
        home=desk.home,
        variables={"PYTHONPATH": str(ROOT)},
    )
    try:
        terminal.until("comparing 2 runs")
        terminal.until("run.log")
    finally:
        terminal.close()
