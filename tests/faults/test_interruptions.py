"""What happens to a run when somebody or something gets in its way: Ctrl-C, SIGKILL, a hang."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.console_rig import TINY, Desk, Outcome, RunFiles, processes_of, until, write_corpus

IMPATIENT = """
import sys
from console import cli, headless
# The real front end, which only waits less long; heartbeats come every five seconds.
headless.SILENCE_SECONDS = 6.0
sys.argv[0] = "kdconsole"
cli.main()
"""
TRAIN_CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: CORPUS, heldout_windows: 4}
train: {steps: 4000, batch: 2, sequence: 32, warmup_steps: 2, learning_rate: 3.0e-3, threads: 1}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


def smoke(corpus: Path, *arguments: str) -> tuple[str, ...]:
    return ("--headless", "smoke", *TINY, "--data", str(corpus), *arguments)


def stopped(outcome: Outcome, run: RunFiles) -> None:
    """Checks that a run was stopped cleanly, and that everyone says so."""
    assert outcome.rc == 130, outcome.said
    assert run.end["status"] == "STOPPED"
    assert run.end["exit_code"] == 130
    assert json.loads((run.path / "exit.json").read_text())["exit_code"] == 130
    assert "NO-GO" in outcome.out
    assert "Traceback" not in outcome.out + outcome.err + (run.path / "launch.log").read_text()
    assert (run.path / "SHA256SUMS").exists()


def test_ctrl_c_during_training_stops_a_smoke_cleanly(warm_desk: Desk, corpus: Path) -> None:
    desk = warm_desk
    console = desk.start(*smoke(corpus))
    until(lambda: desk.run.has("step"), "the first step")
    console.interrupt()
    outcome = console.wait()
    stopped(outcome, desk.run)
    assert "SIGTERM in phase train" in outcome.text
    assert desk.run.end["steps"] == len(desk.run.events("step"))
    desk.is_quiet()


def test_ctrl_c_while_torch_is_imported_stops_a_smoke_cleanly(desk: Desk, corpus: Path) -> None:
    console = desk.start(*smoke(corpus))
    until(lambda: desk.run.has("phase", "import"), "the import phase")
    console.interrupt()
    outcome = console.wait()
    stopped(outcome, desk.run)
    assert "SIGTERM in phase import" in outcome.text
    assert not desk.run.has("run"), "it imported everything first"
    desk.is_quiet()


def test_ctrl_c_during_the_launch_leaves_no_run_behind(desk: Desk, corpus: Path) -> None:
    console = desk.start(*smoke(corpus))
    until((desk.run.path / "supervisor.jsonl").exists, "the supervisor")
    console.interrupt()
    outcome = console.wait()
    assert outcome.rc == 130, outcome.said
    assert (desk.run.path / "exit.json").exists()
    desk.is_quiet()


def test_a_second_ctrl_c_ends_a_smoke_at_once(desk: Desk, corpus: Path) -> None:
    console = desk.start(*smoke(corpus))
    until(lambda: desk.run.has("phase", "import"), "the import phase")
    os.kill(desk.run.trainer(), signal.SIGSTOP)  # So that it cannot follow the first one.
    console.interrupt()
    assert console.process.stderr is not None
    while "stopping" not in console.process.stderr.readline():
        assert console.process.poll() is None
    again = time.monotonic()
    console.interrupt()
    outcome = console.wait()
    assert outcome.rc == 130, outcome.said
    assert "killed by SIGKILL" in outcome.text
    assert time.monotonic() - again < 20  # the first one alone is given 30
    desk.is_quiet()


def test_a_smoke_goes_on_when_its_console_is_killed_and_attach_reports_it(warm_desk: Desk, corpus: Path) -> None:
    desk = warm_desk
    console = desk.start(*smoke(corpus, "--max-steps", "60"))
    until(lambda: desk.run.has("phase", "import"), "the import phase")
    console.process.kill()
    console.wait()
    outcome = desk.call("--headless", "attach", desk.run.path.name)
    assert outcome.rc == 0, outcome.said
    assert "[SMOKE] 60 steps" in outcome.out
    assert (desk.run.path / "SHA256SUMS").exists()
    desk.is_quiet()


def test_an_engine_that_is_killed_is_reported_as_crashed(desk: Desk, corpus: Path) -> None:
    console = desk.start(*smoke(corpus))
    until(lambda: desk.run.has("phase", "self-check"), "the self-check")
    os.kill(desk.run.trainer(), signal.SIGKILL)
    outcome = console.wait()
    assert outcome.rc == 5, outcome.said
    assert "killed by SIGKILL" in outcome.text
    assert not desk.run.has("end")
    again = desk.call("--headless", "attach", str(desk.run.path), "--json")
    assert again.rc == 5
    assert json.loads(again.out)["status"] == "CRASHED"
    desk.is_quiet()


def test_an_engine_that_hangs_is_ended_and_reported_as_a_time_out(desk: Desk, corpus: Path) -> None:
    console = desk.start(*smoke(corpus), command=("-c", IMPATIENT))
    until(lambda: desk.run.has("phase", "import"), "the import phase")
    os.kill(desk.run.trainer(), signal.SIGSTOP)
    outcome = console.wait()
    assert outcome.rc == 4, outcome.said
    assert "nothing heard from the run for" in outcome.text
    desk.is_quiet()


def test_ctrl_c_leaves_a_train_run_going_and_stop_ends_it(warm_desk: Desk, corpus: Path) -> None:
    desk = warm_desk
    desk.write("config.yaml", TRAIN_CONFIG.replace("CORPUS", str(corpus)))
    console = desk.start("--headless", "train", "config.yaml")
    until(lambda: desk.run.has("step"), "the first step")
    console.interrupt()
    outcome = console.wait()
    name = desk.run.path.name
    assert outcome.rc == 0, outcome.said
    assert f"kdconsole stop {name}" in outcome.err
    assert processes_of(desk.run.path), "the run ended with its console"
    assert " running " in desk.call("runs").out

    ended = desk.call("stop", name)
    assert ended.rc == 0, ended.said
    assert ended.out.startswith(f"{name}: CANCELLED: exit code 130; ")
    desk.is_quiet()
    assert desk.run.end["status"] == "STOPPED"
    assert not (desk.run.path / "model").exists()
    assert desk.call("--headless", "attach", name).rc == 130
