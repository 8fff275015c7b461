"""The real command, killed with SIGKILL at random moments and resumed until done: bitwise the undisturbed run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.console_rig import Desk, Outcome, RunFiles, until, write_corpus

KILLS = int(os.environ.get("KDCONSOLE_TEST_KILLS", "5"))
STEPS, EVERY = 60, 4
SETTINGS = (
    *("--quiet", "--set", "train.batch=2", "--set", "train.sequence=32", "--set", "train.threads=1"),
    *("--set", f"train.steps={STEPS}", "--set", "train.warmup_steps=5", "--set", "train.evaluate_every=10"),
    *("--set", "data.heldout_windows=4", "--set", f"checkpoint.every_steps={EVERY}"),
)


def config_of(desk: Desk, corpus: Path) -> Path:
    made = desk.call("config", "init")
    text = made.out.replace("builtin:stdlib", str(corpus))
    return desk.write("config.yaml", text)


def losses(run: RunFiles) -> dict[int, tuple[float, float, float, float]]:
    """Of each step as the last attempt that made it left it."""
    return {e["step"]: (e["loss"], e["ce"], e["kd"], e["grad_norm"]) for e in run.events("step")}


def final_weights(run: RunFiles) -> str:
    file = run.path / "checkpoints" / f"ckpt-step-{STEPS:06d}" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def trainer_of(run: RunFiles, attempt: int) -> int | None:
    """Pid of the engine of an attempt, once the supervisor recorded it."""
    lines = (run.path / "supervisor.jsonl").read_text().splitlines()
    started = [entry for line in lines if (entry := json.loads(line))["event"] == "started"]
    return int(started[attempt - 1]["trainer"]["pid"]) if len(started) >= attempt else None


@dataclass(frozen=True)
class Both:
    undisturbed: Outcome
    killed: Outcome
    attempts: int


def killed_at(desk: Desk, command: list[str], attempt: int, step: int) -> Outcome:
    """Starts an attempt and kills its engine as soon as it has made a step."""
    going = desk.start(*command)
    run = desk.run

    def made() -> bool:
        return len(run.events("run")) >= attempt and run.events("step")[-1:] != [] and reached() >= step

    def reached() -> int:
        now = [e for e in run.events() if e["event"] in ("run", "step")]
        last = max(i for i, e in enumerate(now) if e["event"] == "run")
        return max((e["step"] for e in now[last:] if e["event"] == "step"), default=0)

    until(lambda: (run.path / "supervisor.jsonl").exists() and trainer_of(run, attempt), "the trainer's identity")
    until(made, f"step {step} of attempt {attempt}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(trainer_of(run, attempt) or 0, signal.SIGKILL)
    return going.wait()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    root = tmp_path_factory.mktemp("resume")
    corpus = write_corpus(root / "corpus.txt")
    desks = {}
    for name in ("undisturbed", "killed"):
        (root / name).mkdir()
        desks[name] = Desk(root / name)
    with ThreadPoolExecutor(1) as pool:
        calm = desks["undisturbed"]
        undisturbed = pool.submit(calm.call, "--headless", "train", str(config_of(calm, corpus)), *SETTINGS)
        desk, choose = desks["killed"], random.Random(20_261_121)
        command = ["--headless", "train", str(config_of(desk, corpus)), *SETTINGS]
        for attempt in range(1, KILLS + 1):
            span = STEPS * attempt // (KILLS + 1)
            # Half of the kills fall on a step that is being saved.
            target = span - span % EVERY if choose.random() < 0.5 else span
            assert killed_at(desk, command, attempt, max(1, target)).rc in (0, 5)
            run = desk.run
            command = ["--headless", "train", "--resume", run.path.name, "--quiet"]
        killed = desk.call(*command)
        yield Both(undisturbed.result(), killed, KILLS + 1)
    for desk in desks.values():
        desk.clear()


def test_a_run_that_was_killed_again_and_again_ends_well(both: Both) -> None:
    assert both.undisturbed.rc == 0, both.undisturbed.said
    assert both.killed.rc == 0, both.killed.said
    attempts = both.killed.run.events("run")
    assert [event["attempt"] for event in attempts] == list(range(1, both.attempts + 1))


def test_its_weights_are_bitwise_those_of_the_undisturbed_run(both: Both) -> None:
    assert final_weights(both.killed.run) == final_weights(both.undisturbed.run)


def test_every_loss_in_its_stream_is_bitwise_that_of_the_undisturbed_run(both: Both) -> None:
    assert losses(both.killed.run) == losses(both.undisturbed.run)
    assert sorted(losses(both.killed.run)) == list(range(1, STEPS + 1))


def test_its_stream_goes_on_without_a_gap_and_marks_what_was_run_again(both: Both) -> None:
    events = both.killed.run.events()
    assert [event["seq"] for event in events] == list(range(len(events)))
    seen: set[int] = set()
    for step in both.killed.run.events("step"):
        assert step["again"] == (step["step"] in seen)
        seen.add(step["step"])


def test_no_kill_cost_more_steps_than_since_the_checkpoint_before_the_last(both: Both) -> None:
    highest = 0
    for event in both.killed.run.events():
        if event["event"] == "step":
            assert event["step"] > highest - 2 * EVERY
            highest = max(highest, event["step"])


def test_its_export_is_proven(both: Both) -> None:
    verdicts = {e["id"]: e["verdict"] for e in both.killed.run.events("verdict")}
    assert verdicts["F-EXPORT-001"] == "PASS"


def test_a_finished_run_is_not_resumed(both: Both) -> None:
    again = both.killed.evidence.parent / "again"
    again.mkdir()
    outcome = Desk(again).call("--headless", "train", "--resume", str(both.killed.run.path))
    assert outcome.rc == 2
    assert "complete already" in outcome.err


def test_a_changed_teacher_is_refused_by_name_and_can_be_allowed(tmp_path: Path) -> None:
    import shutil

    from engine.formats import resolve_builtin

    desk = Desk(tmp_path)
    corpus = write_corpus(tmp_path / "corpus.txt")
    teacher = tmp_path / "teacher"
    shutil.copytree(resolve_builtin("builtin:teacher"), teacher)
    config = config_of(desk, corpus)
    config.write_text(config.read_text().replace("builtin:teacher", str(teacher)))
    going = desk.start("--headless", "train", str(config), *SETTINGS, "--set", "train.steps=4000")
    run = desk.run
    until(lambda: run.has("checkpoint"), "a checkpoint")
    assert desk.call("stop", run.path.name).rc == 0
    assert going.wait().rc == 130
    assert run.events("checkpoint")[-1]["kind"] in ("interrupt", "periodic", "periodic+interrupt")
    assert run.end["status"] == "STOPPED"

    weights = teacher / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1  # the lowest bit of the last weight
    weights.write_bytes(raw)
    refused = desk.call("--headless", "train", "--resume", run.path.name)
    assert refused.rc == 2, refused.said
    assert "the teacher's weights: changed since the run began" in refused.text
    assert "--allow-changed teacher" in refused.text

    going = desk.start("--headless", "train", "--resume", run.path.name, "--allow-changed", "teacher", "--quiet")
    until(lambda: len(run.events("run")) == 3, "a third attempt")
    last = max(e["step"] for e in run.events("step"))
    until(lambda: max(e["step"] for e in run.events("step")) > last, "a step of the third attempt")
    assert desk.call("stop", run.path.name).rc == 0
    going.wait()
    desk.is_quiet()
