"""`kdconsole verify` on real runs: nothing is found in them as they are, and every single change is found and named."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from damage import KINDS, Damage, reseal
from run_dirs import crashed_run, live_run, lost_run

from console.cli import cli
from console.verify import directory as verifying
from console.verify.directory import Verified, verify
from console.verify.fold import Faults, Fold
from dispatch.manifest import CONFIG, CONTRACT, EVENTS, EXIT, MANIFEST, SUMS, Manifest, read_manifest, write_manifest
from dispatch.runs import stop
from dispatch.sums import read_sums
from dispatch.transport import LocalTransport
from engine.checkpoint import committed, encode_manifest
from engine.checkpoint import read_manifest as checkpoint_manifest
from engine.errors import ExitCode, RunError
from engine.stream import Event, Log, Phase, Step, Verdict
from tests.console_rig import Desk, RunFiles, until, write_corpus
from tests.nursery import Nursery
from tests.streams import run_event, smoke_contract, smoke_events, with_verdicts

EVIDENCE = sorted(path.parent for path in Path(__file__).parents[2].glob(f"evidence/*/{SUMS}"))
CHANGES = 50
FEW = 2 * len(KINDS)
"""Of each kind two; the others are slow."""
RUN = """\
teacher: builtin:teacher
student: builtin:student
data: {path: CORPUS, heldout_windows: 4}
train:
  {steps: STEPS, batch: 2, sequence: 32, warmup_steps: 5, learning_rate: 6.0e-3, min_learning_rate: 3.0e-4,
   evaluate_every: 10, threads: 1}
checkpoint: {every_steps: EVERY}
"""
SECRET = "hf_" + "a" * 30


def config(desk: Desk, steps: int, every: int) -> str:
    """A configuration of a full run that takes seconds."""
    corpus = write_corpus(desk.cwd / "corpus.txt")
    text = RUN.replace("CORPUS", str(corpus)).replace("STEPS", str(steps)).replace("EVERY", str(every))
    return str(desk.write("config.yaml", text))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """A full run of the real command, sealed, with checkpoints and model."""
    desk = Desk(tmp_path_factory.mktemp("trained"), nursery)
    outcome = desk.call("--headless", "train", config(desk, 24, 8), "--force")
    assert outcome.rc == 0, outcome.said
    desk.is_quiet()
    return outcome.run.path


@pytest.fixture(scope="session")
def smoked(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """A smoke of the real command, sealed, with a projection."""
    desk = Desk(tmp_path_factory.mktemp("smoked"), nursery)
    outcome = desk.smoke("--max-steps", "14", corpus=write_corpus(desk.cwd / "corpus.txt"))
    assert outcome.rc == 0, outcome.said
    return outcome.run.path


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> dict[str, Path]:
    """One run of three attempts, sealed after each: stopped, killed between two checkpoints, and done."""
    root = tmp_path_factory.mktemp("resumed")
    desk = Desk(root, nursery)
    file = config(desk, 240, 20)
    found: dict[str, Path] = {}

    def interrupted(command: list[str], attempt: int, end: Callable[[RunFiles], None]) -> None:
        going = desk.start(*command)
        until(lambda: len(desk.run.events("run")) == attempt, "the attempt has begun")
        until(lambda: len([e for e in desk.run.events("checkpoint") if e["seq"] > began(attempt)]) > 1, "checkpoints")
        end(desk.run)
        going.wait()

    def began(attempt: int) -> int:
        return int(desk.run.events("run")[attempt - 1]["seq"])

    def stopped(run: RunFiles) -> None:
        asyncio.run(stop(LocalTransport(), run.path))

    def killed(run: RunFiles) -> None:
        lines = [json.loads(line) for line in (run.path / "supervisor.jsonl").read_text().splitlines()]
        os.kill([line["trainer"]["pid"] for line in lines if line["event"] == "started"][-1], signal.SIGKILL)

    interrupted(["--headless", "train", file, "--force"], 1, stopped)
    found["stopped"] = kept(desk.run.path, root / "stopped")
    again = ["--headless", "train", "--resume", desk.run.path.name]
    interrupted(again, 2, killed)
    found["killed"] = kept(desk.run.path, root / "killed")
    outcome = desk.call(*again)
    assert outcome.rc == 0, outcome.said
    desk.is_quiet()
    return found | {"resumed": desk.run.path}


def kept(directory: Path, below: Path) -> Path:
    """A copy of a run directory below another one."""
    return Path(shutil.copytree(directory, below / directory.name, symlinks=True))


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return kept(trained, tmp_path / "copy")


def said(verified: Verified) -> str:
    """Everything that counts against it."""
    return "\n".join(f"{each.name}: {each.why}" for each in (*verified.differences, *verified.unproven))


def holds(verified: Verified) -> None:
    assert not verified.differences, said(verified)
    assert verified.exit_code == ExitCode.OK, said(verified)


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)


def events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / EVENTS).read_bytes().splitlines()]


def rewrite(directory: Path, lines: list[dict[str, Any]]) -> None:
    """Another stream, with the checksums that fit to it."""
    (directory / EVENTS).write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    reseal(directory)


def first(lines: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(line for line in lines if line["event"] == kind)


# Good runs


def test_a_full_run_holds_with_its_weights(trained: Path) -> None:
    verified = verify(trained)
    holds(verified)
    assert verified.evidence_id == read_sums(trained).evidence_id
    told = {claim.name for claim in verified.claims}
    names = {SUMS, *(name for name in read_sums(trained).files)} - {SUMS}
    assert names <= told
    assert {"F-EXPORT-001", "final_loss", "config_fingerprint", "model", "launch.log: steps and losses"} <= told
    assert {f"checkpoints/{path.name}" for path in committed(trained)} <= told
    assert not [claim for claim in verified.claims if claim.mark.value == "cannot be told"]


def test_a_smoke_holds_and_its_projection_comes_out_the_same(smoked: Path) -> None:
    verified = verify(smoked)
    holds(verified)
    assert "projection p50_seconds" in {claim.name for claim in verified.claims}


@pytest.mark.parametrize("which", ["stopped", "killed", "resumed"])
def test_a_run_that_was_stopped_killed_and_resumed_holds(resumed: dict[str, Path], which: str) -> None:
    holds(verify(resumed[which]))


@pytest.mark.parametrize("directory", EVIDENCE, ids=lambda path: path.name)
def test_committed_evidence_holds_whatever_version_wrote_it(directory: Path, tmp_path: Path) -> None:
    holds(verify(kept(directory, tmp_path)))


def test_a_copy_under_another_name_holds(trained: Path, tmp_path: Path) -> None:
    holds(verify(Path(shutil.copytree(trained, tmp_path / "attached to a pull request"))))


def test_weights_that_are_not_here_are_told_and_are_no_difference(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    shutil.rmtree(copy / "model")
    verified = verify(copy)
    holds(verified)
    absent = [claim.name for claim in verified.claims if claim.why.startswith("absent")]
    assert "model/model.safetensors" in absent
    assert "checkpoints/LATEST" in absent


def followed(events: list[Event]) -> tuple[Fold, Faults]:
    """A stream, followed to its end."""
    faults = Faults()
    fold = Fold(smoke_contract(), faults)
    for line, event in enumerate(events, 1):
        fold.see(event, line)
    return fold, faults


def test_a_verdict_that_a_killed_process_left_unsaid_is_said_by_the_next_attempt() -> None:
    whole = with_verdicts(smoke_events(12))[:-1]
    at, fallen = next((number, event) for number, event in enumerate(whole) if isinstance(event, Verdict))
    begun: list[Event] = [*whole[:at], Phase(name="import"), run_event(attempt=2)]
    fold, faults = followed([*begun, fallen])
    assert (faults.counts, fold.unsaid) == ({}, {})
    fold, _ = followed(begun)
    assert list(fold.unsaid) == [fallen.id]
    _, faults = followed([*begun, Log(level="info", message="another")])
    assert list(faults.counts) == ["verdicts"]


def test_a_resumed_attempt_goes_on_with_what_its_checkpoint_held_although_it_made_no_step() -> None:
    steps = [event for event in smoke_events(8) if isinstance(event, Step)]
    begun: list[Event] = [Phase(name="import"), run_event(), *steps, Phase(name="import"), run_event(attempt=2)]
    fold, faults = followed([*begun, Log(level="info", message="resumed from ckpt-step-000005, step 5")])
    assert list(fold.losses) == [step.loss for step in steps[:5]]
    again = [msgspec.structs.replace(step, again=True) for step in steps[5:]]
    fold, faults = followed([*begun, Log(level="info", message="resumed from ckpt-step-000005, step 5"), *again])
    assert faults.counts == {}
    _, faults = followed([*begun, Log(level="info", message="resumed from ckpt-step-000005, step 5"), *again[1:]])
    assert list(faults.counts) == ["steps"]


# Single changes


@pytest.mark.parametrize("seed", [*range(FEW), *(pytest.param(n, marks=pytest.mark.slow) for n in range(FEW, CHANGES))])
def test_a_single_change_is_found_and_named(copy: Path, seed: int) -> None:
    choose = random.Random(seed)
    damage = KINDS[seed % len(KINDS)](copy, choose)
    found(copy, damage)


def found(copy: Path, damage: Damage) -> None:
    verified = verify(copy)
    told = said(verified)
    assert verified.exit_code in (ExitCode.FAILED, ExitCode.UNDECIDED), damage
    assert any(name in told for name in damage.names), f"{damage}\n{told}"
    if damage.line is not None:
        assert f"{EVENTS}: line {damage.line}" in told, f"{damage}\n{told}"


STREAM_CHANGES: dict[str, Callable[[list[bytes], int], int]] = {}
"""Each changes lines of a stream at a place, and returns the number of the line that has to be named."""


def stream_change(change: Callable[[list[bytes], int], int]) -> Callable[[list[bytes], int], int]:
    STREAM_CHANGES[change.__name__] = change
    return change


@stream_change
def deleted(lines: list[bytes], at: int) -> int:
    del lines[at]
    return at + 1


@stream_change
def doubled(lines: list[bytes], at: int) -> int:
    lines.insert(at, lines[at])
    return at + 2


@stream_change
def swapped(lines: list[bytes], at: int) -> int:
    lines[at], lines[at + 1] = lines[at + 1], lines[at]
    return at + 1


@stream_change
def inserted(lines: list[bytes], at: int) -> int:
    beat = next(json.loads(line) for line in lines if b'"heartbeat"' in line)
    lines.insert(at, json.dumps(beat | {"seq": at}).encode() + b"\n")
    return at + 2


@stream_change
def of_another_run(lines: list[bytes], at: int) -> int:
    lines[at] = json.dumps(json.loads(lines[at]) | {"run": "another"}).encode() + b"\n"
    return at + 1


@stream_change
def earlier(lines: list[bytes], at: int) -> int:
    event = json.loads(lines[at])
    lines[at] = json.dumps(event | {"t": event["t"] - 3600.0}).encode() + b"\n"
    return at + 1 if at else -1


@stream_change
def broken(lines: list[bytes], at: int) -> int:
    lines[at] = lines[at][: len(lines[at]) // 2] + b"\n"
    return at + 1


@pytest.mark.parametrize("change", STREAM_CHANGES)
def test_new_checksums_do_not_hide_a_changed_stream(copy: Path, change: str) -> None:
    whole = (copy / EVENTS).read_bytes().splitlines(keepends=True)
    for at in [1, 2, *random.Random(change).sample(range(3, len(whole) - 1), 8)]:
        lines = list(whole)
        line = STREAM_CHANGES[change](lines, at)
        (copy / EVENTS).write_bytes(b"".join(lines))
        reseal(copy)
        verified = verify(copy)
        assert verified.exit_code == ExitCode.FAILED, at
        assert f"{EVENTS}: line {line}" in said(verified), (at, said(verified))


def test_a_missing_event_is_named_by_what_stands_around_it(copy: Path) -> None:
    lines = events(copy)
    del lines[40]
    rewrite(copy, lines)
    assert f"{EVENTS}: line 41: seq 41 after seq 39: an event is missing" in said(verify(copy))


def test_a_step_that_was_taken_out_is_found_although_everything_was_counted_anew(copy: Path) -> None:
    lines = events(copy)
    at = next(n for n, line in enumerate(lines) if line["event"] == "step" and line["step"] == 12)
    del lines[at]
    for seq, line in enumerate(lines):
        line["seq"] = seq
    rewrite(copy, lines)
    next_one = next(n for n, line in enumerate(lines) if line["event"] == "step" and line["step"] == 13)
    verified = verify(copy)
    told = said(verified)
    assert f"line {next_one + 1}, seq {next_one}, step: step 13, expected step 12" in told
    assert sum(claim.name == "steps count without a gap" for claim in verified.differences) == 1
    assert "launch.log: attempt 1: step 12" in told


def test_a_verdict_that_was_taken_out_is_found_although_everything_was_counted_anew(copy: Path) -> None:
    lines = events(copy)
    at = next(n for n, line in enumerate(lines) if line["event"] == "verdict")
    gone = lines.pop(at)
    for seq, line in enumerate(lines):
        line["seq"] = seq
    rewrite(copy, lines)
    told = said(verify(copy))
    assert f"before it PASS {gone['id']} fell and was not stated" in told


def test_the_end_alone_taken_away_is_found(copy: Path) -> None:
    rewrite(copy, events(copy)[:-1])
    assert "dispatch.json: outcome.status" in said(verify(copy))


CHANGED: dict[str, tuple[Callable[[list[dict[str, Any]]], None], str]] = {
    "a loss": (lambda e: first(e, "step").update(loss=1.0), "launch.log: attempt 1: step 1"),
    "a verdict": (lambda e: first(e, "verdict").update(verdict="FAIL"), "verdict: FAIL F-"),
    "a severity": (lambda e: first(e, "verdict").update(severity="warn"), "severity is stated as warn"),
    "what was observed": (lambda e: first(e, "verdict").update(observed="0.5"), "observed is stated as 0.5"),
    "a verdict's step": (lambda e: first(e, "verdict").update(step=7), "step is stated as 7"),
    "the first loss": (lambda e: e[-1]["summary"].update(initial_loss=9.0), "initial_loss"),
    "the last loss": (lambda e: e[-1]["summary"].update(final_loss=0.1), "final_loss"),
    "the last held-out loss": (lambda e: e[-1]["summary"].update(heldout_final=0.1), "heldout_final"),
    "the speed": (lambda e: e[-1]["summary"].update(steps_per_second=1e6), "steps_per_second"),
    "the speed in tokens": (lambda e: e[-1]["summary"].update(tokens_per_second=1e6), "tokens_per_second"),
    "the time": (lambda e: e[-1]["summary"].update(train_seconds=1e-3), "the steps alone took longer"),
    "a missing summary": (lambda e: e[-1]["summary"].pop("final_loss"), "final_loss: missing"),
    "the steps": (lambda e: e[-1].update(steps=23), "steps: 23"),
    "the exit code": (lambda e: e[-1].update(exit_code=1), "exit code by exit.json"),
    "the status": (lambda e: e[-1].update(status="FAILED"), "a run that FAILED did not end well"),
    "the attempt": (lambda e: first(e, "run").update(attempt=2), "attempt 2, expected 1"),
    "the mode": (lambda e: first(e, "run").update(mode="smoke"), "run event of attempt 1: mode"),
    "alpha": (lambda e: first(e, "run").update(alpha=0.9), "run event of attempt 1: alpha"),
    "the target": (lambda e: first(e, "run").update(target_steps=25), "run event of attempt 1: target_steps"),
    "the device": (lambda e: first(e, "run").update(device="cuda"), "dispatch.json: device"),
    "an input": (lambda e: first(e, "inputs")["digests"].update(data="0" * 64), "inputs.data"),
    "a checkpoint's hash": (lambda e: e[_last(e, "checkpoint")].update(sha256="0" * 64), ": sha256"),
    "a checkpoint's path": (lambda e: e[_last(e, "checkpoint")].update(path="model"), ": path"),
    "a step made again": (lambda e: first(e, "step").update(again=True), "step 1 was not made before"),
    "an evaluation's step": (lambda e: e[_last(e, "eval")].update(step=9), "at step 9, expected step 24"),
    "the utilisation": (lambda e: first(e, "efficiency").update(mfu=0.9), "utilisation 0.9, expected"),
    "a speed": (lambda e: first(e, "efficiency").update(tokens_per_second=1e9), "1000000000.0 tokens/s, expected"),
    "the cost of a token": (lambda e: first(e, "efficiency").update(flops_per_token=1.0), "utilisation"),
    "a part of a step": (lambda e: first(e, "efficiency")["split"].update(teacher=9.0), "the mean step"),
    "a speed's step": (lambda e: first(e, "efficiency").update(step=9), "of step 9, expected the last one made"),
    "a speed's steps": (lambda e: first(e, "efficiency").update(steps=90), "a mean of 90 steps, of"),
    "a peak": (lambda e: first(e, "efficiency").update(peak_flops=None), "utilisation and peak belong together"),
    "a step's tokens": (lambda e: first(e, "step").update(tokens=1), "1 tokens, expected 64"),
}


def _last(lines: list[dict[str, Any]], kind: str) -> int:
    return max(number for number, line in enumerate(lines) if line["event"] == kind)


@pytest.mark.parametrize("what", CHANGED)
def test_new_checksums_do_not_hide_a_changed_event(copy: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, named = CHANGED[what]
    lines = events(copy)
    change(lines)
    rewrite(copy, lines)
    # These tests run while the engine is worked on: its words are judged as those of the engine that ran.
    monkeypatch.setattr(verifying, "_same_engine", lambda manifest: True)
    verified = verify(copy)
    assert verified.exit_code == ExitCode.FAILED
    assert named in "\n".join(f"{each.name}: {each.stated}; {each.why}" for each in verified.differences)


def test_an_event_after_the_end_is_found(copy: Path) -> None:
    lines = events(copy)
    rewrite(copy, [*lines, lines[1] | {"seq": len(lines), "t": lines[-1]["t"] + 1}])
    assert f"line {len(lines) + 1}, seq {len(lines)}, heartbeat: an event after the end" in said(verify(copy))


def test_bytes_after_the_end_are_found(copy: Path) -> None:
    with (copy / EVENTS).open("ab") as file:
        file.write(b'{"event":"st')
    reseal(copy)
    assert "12 bytes after the end event" in said(verify(copy))


def test_a_projection_is_held_against_the_times_of_the_steps(smoked: Path, tmp_path: Path) -> None:
    copy = kept(smoked, tmp_path)
    lines = events(copy)
    first(lines, "projection")["p50_seconds"] *= 0.5
    rewrite(copy, lines)
    assert "projection p50_seconds" in said(verify(copy))


def manifest_of(directory: Path) -> Manifest:
    return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)


def test_new_checksums_do_not_hide_a_changed_manifest(copy: Path) -> None:
    manifest = manifest_of(copy)
    assert manifest.outcome is not None
    changed: dict[str, dict[str, Any]] = {
        "outcome.reason": {"outcome": msgspec.structs.replace(manifest.outcome, reason="luck")},
        "attempts[1].end": {"attempts": (msgspec.structs.replace(manifest.attempts[0], end="exit code 1"),)},
        "seconds": {"seconds": 1.0},
        "verdicts": {"verdicts": manifest.verdicts[1:]},
        "created": {"created_unix": manifest.created_unix - 86_400},
        "contract_sha256": {"contract_sha256": "0" * 64},
        "gate_fingerprint": {"gate_fingerprint": "0" * 64},
    }
    for name, changes in changed.items():
        write_manifest(copy, msgspec.structs.replace(manifest, **changes))
        reseal(copy)
        assert name in said(verify(copy)), name


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        (CONFIG, "learning_rate: 0.006", "learning_rate: 0.007", "config_fingerprint: config.yaml is another one"),
        (CONTRACT, "F-FINITE-001", "F-FINITE-002", "F-FINITE-002"),
        (EXIT, '"exit_code": 0', '"exit_code": 1', "exit.json and supervisor.jsonl: exit_code"),
        ("supervisor.jsonl", '"event": "exited", "run": "', '"event": "exited", "run": "x', "supervisor.jsonl: line"),
        ("launch.log", "Step 3/24", "Step 4/24", "launch.log: attempt 1: step 4"),
        ("checkpoints/LATEST", "000024", "000023", "points to ckpt-step-000023"),
        ("checkpoints/ckpt-step-000016/manifest.json", '"tokens":1024', '"tokens":1025', "its digest is not that of"),
        ("model/config.json", '"model_type"', '"model_kind"', "model/config.json: no model_type"),
    ],
)
def test_new_checksums_do_not_hide_a_changed_file(copy: Path, name: str, old: str, new: str, told: str) -> None:
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    reseal(copy)
    verified = verify(copy)
    assert verified.exit_code == ExitCode.FAILED
    assert told in said(verified)


@pytest.mark.parametrize("name", ["checkpoints/ckpt-step-000024/model.safetensors", "model/model.safetensors"])
def test_new_checksums_do_not_hide_damaged_weights(copy: Path, name: str) -> None:
    raw = bytearray((copy / name).read_bytes())
    (copy / name).write_bytes(raw[:-4])
    reseal(copy)
    assert name.rpartition("/")[0] in said(verify(copy))


def test_a_checkpoint_of_other_weights_than_the_stream_says_is_found(copy: Path) -> None:
    one, other = copy / "checkpoints/ckpt-step-000024", copy / "checkpoints/ckpt-step-000016"
    shutil.copy(other / "model.safetensors", one / "model.safetensors")
    reseal(copy)
    assert "ckpt-step-000024/model.safetensors: SHA-256" in said(verify(copy))


@pytest.mark.parametrize("field", ["final_loss", "tokens"])
def test_a_checkpoint_that_says_it_came_further_than_the_stream_is_found(copy: Path, field: str) -> None:
    path = committed(copy)[0]
    whole = checkpoint_manifest(path)
    state = msgspec.structs.replace(whole.state, **{field: 64.0 if field == "final_loss" else 64})
    (path / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(whole, state=state)))
    reseal(copy)
    name = "loss" if field == "final_loss" else field
    assert f"{path.name}: {name}" in said(verify(copy))


def test_a_checkpoint_made_from_another_corpus_is_found_unless_a_resume_allowed_that(copy: Path) -> None:
    path = committed(copy)[0]
    whole = checkpoint_manifest(path)
    state = msgspec.structs.replace(whole.state, digests=whole.state.digests | {"data": "0" * 64})
    (path / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(whole, state=state)))
    reseal(copy)
    assert f"{path.name}: made from another data" in said(verify(copy))
    (copy / "resume.json").write_text('{"allow_changed": ["data"]}')
    reseal(copy)
    holds(verify(copy))


def test_a_configuration_that_a_resume_was_allowed_to_change_is_told_and_no_difference(copy: Path) -> None:
    text = (copy / CONFIG).read_text()
    (copy / CONFIG).write_text(
        text.replace("learning_rate: 0.006", "learning_rate: 0.005").replace("alpha: 0.3", "alpha: 0.4")
    )
    (copy / "resume.json").write_text('{"allow_changed": ["config"]}')
    reseal(copy)
    verified = verify(copy)
    holds(verified)
    told = next(claim for claim in verified.claims if claim.name == "config_fingerprint")
    assert "which resume.json allows" in told.why


# What cannot be told, and what is nothing to verify


def test_without_checksums_nothing_is_proven(copy: Path) -> None:
    (copy / SUMS).unlink()
    verified = verify(copy)
    assert (verified.exit_code, verified.differences) == (ExitCode.UNDECIDED, [])
    assert f"there is no {SUMS}" in said(verified)


def test_what_looked_like_a_secret_and_was_taken_out_is_no_difference(copy: Path) -> None:
    lines = events(copy)
    lines[-1]["reason"] = f"cannot use {SECRET} any more"
    rewrite(copy, lines)
    manifest = manifest_of(copy)
    assert manifest.outcome is not None
    told = msgspec.structs.replace(manifest.outcome, reason=lines[-1]["reason"])
    write_manifest(copy, msgspec.structs.replace(manifest, outcome=told))
    reseal(copy)
    assert SECRET not in (copy / MANIFEST).read_text()
    holds(verify(copy))


def test_events_of_a_later_writer_have_their_place_and_are_no_difference(copy: Path) -> None:
    lines = events(copy)
    late = {"event": "tomorrow", "v": 1, "run": lines[0]["run"], "seq": 60, "t": lines[60]["t"], "what": [1]}
    for line in lines[60:]:
        line["seq"] += 1
    lines.insert(60, late)
    rewrite(copy, lines)
    holds(verify(copy))


def test_a_run_that_goes_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it goes on"):
        verify(live_run(tmp_path))


def test_a_run_that_was_killed_is_replayed_with_its_torn_line(tmp_path: Path) -> None:
    verified = verify(crashed_run(tmp_path))
    torn = next(claim for claim in verified.claims if claim.name == "the last line")
    assert torn.recomputed == "29 bytes, left out"
    assert "every line is an event" not in said(verified)


def test_a_step_that_was_printed_into_a_dump_of_stacks_is_no_difference(copy: Path) -> None:
    text = (copy / "launch.log").read_text()
    assert "\n  Step 5/24" in text
    dump = 'Current thread 0x00007f (most recent call first):\n  File "trainer.py", line 1'
    (copy / "launch.log").write_text(text.replace("\n  Step 5/24", f"\n{dump}  Step 5/24"))
    reseal(copy)
    holds(verify(copy))


def test_a_killed_attempt_may_have_printed_one_step_less(resumed: dict[str, Path], tmp_path: Path) -> None:
    copy = kept(resumed["killed"], tmp_path)
    lines = (copy / "launch.log").read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if line.startswith("  Step "))
    (copy / "launch.log").write_text("".join([*lines[:last], *lines[last + 1 :]]))
    reseal(copy)
    verified = verify(copy)
    holds(verified)
    assert "steps are printed" in next(each.why for each in verified.claims if each.part == "log")


def test_half_a_line_after_the_end_is_none_where_another_attempt_was_killed_as_it_began(copy: Path) -> None:
    lines = (copy / "supervisor.jsonl").read_text().splitlines(keepends=True)
    with (copy / "supervisor.jsonl").open("a") as file:
        file.write(next(line for line in lines if '"starting"' in line))
    with (copy / EVENTS).open("ab") as file:
        file.write(b'{"event":"ph')
    told = {claim.name: claim.recomputed for claim in verify(copy).claims}
    assert told["the last line"] == "12 bytes, left out"


def test_a_lost_run_that_was_never_sealed_is_not_proven(tmp_path: Path) -> None:
    verified = verify(lost_run(tmp_path))
    assert {claim.name for claim in verified.unproven} == {SUMS, "outcome, attempts and verdicts"}


@pytest.mark.parametrize("what", ["nothing", "empty", "file"])
def test_where_there_is_nothing_to_verify_the_command_ends_with_2(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.write_bytes(b"\x00\x01\x02")
    with pytest.raises(RunError) as caught:
        verify(path)
    assert caught.value.exit_code == ExitCode.USAGE


# Hostile directories


def test_pipes_links_junk_and_escapes_neither_hang_nor_reach_the_terminal(copy: Path) -> None:
    for name in (EVENTS, "launch.log", EXIT, "supervisor.jsonl", "checkpoints/LATEST", "model/config.json"):
        (copy / name).unlink()
        os.mkfifo(copy / name)
    os.mkfifo(copy / "pipe")
    (copy / "up").symlink_to("..")
    (copy / "loop").symlink_to("loop")
    (copy / ("x" * 200)).mkdir()
    (copy / ("x" * 200) / ("y" * 250)).write_bytes(b"")
    (copy / "red\x1b[31m\u202e.txt").write_bytes(b"")
    (copy / os.fsdecode(b"not utf-8 \xff")).write_bytes(b"")
    (copy / CONTRACT).write_bytes(b"\xff\xfe[[[")
    ended = threading.Event()
    results: list[Result] = []

    def call() -> None:
        results.append(command(copy))
        ended.set()

    threading.Thread(target=call, daemon=True).start()
    assert ended.wait(60.0), "it hangs"
    [result] = results
    assert result.exit_code == 1, result.output
    assert not set(result.output) & {"\x1b", "\u202e", "\udcff"}
    told = [line for line in result.output.splitlines() if line.startswith(f"✘ {EVENTS}: stated ")]
    assert told[0].endswith("recomputed not a regular file of this directory")


@pytest.mark.parametrize("seed", range(30))
def test_no_junk_in_any_small_file_crashes_it(copy: Path, seed: int) -> None:
    choose = random.Random(seed)
    name = choose.choice([CONFIG, CONTRACT, MANIFEST, EVENTS, EXIT, "supervisor.jsonl", "launch.log", SUMS])
    raw = (copy / name).read_bytes()
    at = choose.randrange(len(raw))
    junk = choose.choice(
        [
            b"[" * 100_000,
            b'\n{"event":"step","v":1,"what":' + b"[" * 5_000 + b"\n",
            b"\x1b]0;x\x07",
            b"9" * 5_000,
            b"\xff\xfe\x00" * 50,
            b"\n" * 1_000,
            b'{"event":"step","v":1,"run":"x","seq":1e400}\n',
            b"\x00" * 70_000,
            b"-1",
            b"null",
        ]
    )
    (copy / name).write_bytes(raw[:at] + junk + raw[at + choose.randrange(200) :])
    result = command(copy)
    assert result.exit_code in (1, 5), result.output
    assert name in result.output
    assert not set(result.output) & {"\x1b", "\x07", "\x00"}


def test_a_line_that_is_nested_without_end_is_no_event_and_nothing_more(copy: Path) -> None:
    lines = (copy / EVENTS).read_bytes().splitlines(keepends=True)
    lines[30] = b'{"event":"tomorrow","v":1,"what":' + b"[" * 5_000 + b"\n"
    (copy / EVENTS).write_bytes(b"".join(lines))
    reseal(copy)
    assert f"{EVENTS}: line 31: " in said(verify(copy))
    assert f"{EVENTS}: line 32: " not in said(verify(copy))


# The command


def test_the_differences_stand_last_beside_the_conclusion(copy: Path) -> None:
    (copy / "launch.log").write_bytes(b"")
    result = command(copy)
    *_, difference, conclusion = [line for line in result.output.splitlines() if line]
    assert result.exit_code == 1
    assert "launch.log" in difference
    assert conclusion.startswith("✘ DIFFERS  2 of ")


def test_the_document_has_every_claim(trained: Path) -> None:
    result = command(trained, "--json")
    [told] = json.loads(result.output)["verified"]
    assert (result.exit_code, told["result"], told["differences"]) == (0, "verified", [])
    assert told["evidence_id"] == read_sums(trained).evidence_id
    assert {"part", "claim", "stated", "recomputed", "mark", "why"} <= set(told["claims"][0])
    assert len(told["claims"]) == len(verify(trained).claims)


def test_the_evidence_id_is_compared(trained: Path) -> None:
    known = read_sums(trained).evidence_id
    assert command(trained, "--id", known).exit_code == 0
    assert command(trained, "--id", known[:12].upper()).exit_code == 0
    other = command(trained, "--id", "0" * 12)
    assert other.exit_code == 1
    assert f"evidence id: stated {'0' * 12}, recomputed {known}" in other.output


@pytest.mark.parametrize("given", ["", "abc", "g" * 12, "0" * 65, "0" * 11])
def test_what_is_no_evidence_id_is_wrong_usage(trained: Path, given: str) -> None:
    result = CliRunner().invoke(cli, ["verify", str(trained), "--id", given])
    assert result.exit_code == 2
    assert "12 to 64 hexadecimal digits" in result.output


def test_several_directories_end_with_the_worst_of_them(trained: Path, copy: Path, tmp_path: Path) -> None:
    assert command(trained, copy).exit_code == 0
    assert command(trained, tmp_path / "nothing").exit_code == 2
    (copy / "launch.log").unlink()
    result = command(trained, copy, tmp_path / "nothing", "--json")
    assert result.exit_code == 1
    document = json.loads(result.output[: result.output.rindex("}") + 1])
    assert [each["result"] for each in document["verified"]] == ["verified", "differs"]
    assert len(document["errors"]) == 1


def test_a_run_is_found_by_its_id(trained: Path) -> None:
    result = command(trained.name[:15], "--evidence", trained.parent)
    assert result.exit_code == 0
    assert str(trained) in result.output.replace("\n", "")


def test_help_says_what_it_does_not_prove() -> None:
    text = " ".join(command("--help").output.split())
    assert "This proves accident, not malice" in text


def test_progress_is_told_and_can_be_silenced(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "TELL_SECONDS", 0.0)
    told: list[str] = []
    verify(trained, say=told.append)
    assert told[0].startswith("verifying ")
    assert told[-1].endswith("MB")
    assert "verifying" in command(trained).stderr
    assert "verifying" not in command(trained, "--quiet").stderr


def test_nothing_is_written(copy: Path) -> None:
    def state() -> Iterator[tuple[str, int]]:
        for path in sorted(copy.rglob("*")):
            yield str(path), path.stat().st_mtime_ns

    before = [*state(), (str(copy), copy.stat().st_mtime_ns)]
    verify(copy)
    assert [*state(), (str(copy), copy.stat().st_mtime_ns)] == before


def test_the_manifest_is_read_as_it_is_sealed(trained: Path) -> None:
    assert read_manifest(trained).outcome is not None
