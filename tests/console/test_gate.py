"""A long training starts only on a passed smoke of the same configuration on the same host, and not an old one."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import socket
import time
from pathlib import Path

import msgspec
import pytest

from console import checks, gate, launch
from console.launch import Job
from console.prepare import Draft, prepare, smoke_command
from dispatch.facts import HostFacts
from dispatch.manifest import EXIT, Remote, read_manifest, write_manifest
from dispatch.places import Reach
from dispatch.sums import files_of, write_sums
from engine.config import RunConfig, load_config
from engine.errors import ConfigError, RunError
from tests.console.run_dirs import make_run
from tests.console_rig import ROOT, Desk
from tests.streams import smoke_events, with_verdicts

NOW = 1_790_000_000.0
DAY = 86_400.0
HERE = socket.gethostname()
FACTS = HostFacts(hostname="spark-1", arch="aarch64", system="Linux", uid=1000, python="3.12.3", executable="/py")


def training(*sets: str) -> RunConfig:
    return load_config(template="builtin", sets=["train.steps=50000", *sets], overrides={"mode": "train"})


def smoke(
    evidence: Path,
    *,
    days: float = 1.0,
    code: int = 0,
    sets: tuple[str, ...] = (),
    host: str | None = None,
    hostname: str = HERE,
    facts: HostFacts | None = None,
    falls: bool = True,
) -> Path:
    """A smoke's directory, which ended so many days before NOW and says that it passed, whatever its losses are."""
    ended = NOW - days * DAY
    events = with_verdicts(smoke_events(10, loss=lambda step: 5.0 + (-0.1 if falls else 0.1) * step))
    shift = ended - 0.5 - events[-1].t
    moved = [msgspec.structs.replace(event, t=event.t + shift) for event in events]
    path = make_run(evidence, moved, code, sets=("train.steps=50000", *sets), host=hostname)
    if host is not None:
        manifest = read_manifest(path)
        remote = Remote(host=host, run_dir=f"/base/runs/{path.name}", python="/py", engine="/engine", facts=facts)
        write_manifest(path, msgspec.structs.replace(manifest, remote=remote))
    return path


def clock(path: Path, *, ended: float | None = None, made: float | None = None) -> None:
    """Gives a smoke other times."""
    record = json.loads((path / EXIT).read_text())
    (path / EXIT).write_text(json.dumps(record | ({} if ended is None else {"ended": ended})))
    if made is not None:
        write_manifest(path, msgspec.structs.replace(read_manifest(path), created_unix=made))


def look(evidence: Path, *sets: str, host: str | None = None, facts: HostFacts | None = None) -> gate.Gate:
    return gate.look(training(*sets), evidence, host, facts=facts, now=NOW)


ONE_MODEL = "teacher and student have the same weights, and 5,000 steps were asked for"


@pytest.mark.parametrize("path", ["builtin:teacher", "gx10:/models/qwen"])
def test_a_long_training_of_a_model_on_itself_is_refused_before_any_smoke_counts(path: str) -> None:
    same = (f"teacher={path}", f"student={path}", "train.steps=5000", "data.tokenizer=builtin")
    with pytest.raises(RunError, match=ONE_MODEL):
        checks.check(training(*same), "gx10")


@pytest.mark.parametrize(
    "sets",
    [
        ("train.steps=4999",),
        ("train.max_steps=4999",),
        ("student.init=random",),
        ("mode=smoke",),
        ("student={from: 'gx10:/models/qwen', layers: [0]}",),
        ("student=gx10:/models/small",),
    ],
)
def test_what_may_well_be_two_models_is_left_to_the_engine(sets: tuple[str, ...]) -> None:
    path = "gx10:/models/qwen"
    given = (f"teacher={path}", f"student={{path: '{path}'}}", "train.steps=5000", "data.tokenizer=builtin", *sets)
    mode = {} if "mode=smoke" in sets else {"mode": "train"}
    checks.check(load_config(template="builtin", sets=given, overrides=mode), "gx10")


def test_a_passed_smoke_of_the_same_configuration_opens_it(tmp_path: Path) -> None:
    closed = look(tmp_path)
    assert (closed.needed, closed.open, closed.smoke) == (True, False, None)
    assert closed.missing == f"no smoke of this configuration in {tmp_path}"
    path = smoke(tmp_path, days=2)
    # Length, checkpoints and the smoke's own settings are not what a smoke proves or disproves.
    for sets in ((), ("train.steps=20000",), ("checkpoint.every_steps=0",), ("smoke.budget_seconds=5",)):
        found = look(tmp_path, *sets)
        assert (found.open, found.smoke, found.missing, found.note) == (True, path.name, "", "")
    assert found.ended == NOW - 2 * DAY
    assert found.told(NOW) == f"{path.name} passed on this machine 2 d 0 h ago"
    assert not look(tmp_path, "train.batch=4").open


def test_a_smoke_that_really_ran_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, *_ = sorted((ROOT / "evidence").glob("*-smoke-*"))
    evidence = tmp_path / "evidence"
    shutil.copytree(ran, evidence / ran.name)
    manifest = read_manifest(ran)
    monkeypatch.setattr("socket.gethostname", lambda: manifest.host.hostname)
    found = gate.look(training(), evidence, now=manifest.created_unix + DAY)
    assert found.smoke == ran.name, found.missing
    assert not gate.look(training("train.seed=1"), evidence, now=manifest.created_unix + DAY).open


def test_the_newest_smoke_that_counts_is_named(tmp_path: Path) -> None:
    smoke(tmp_path, days=3)
    newest = smoke(tmp_path, days=1)
    smoke(tmp_path, days=0.5, code=1)
    assert look(tmp_path).smoke == newest.name


@pytest.mark.parametrize(("days", "opens"), [(6.99, True), (7.01, False), (400, False)])
def test_it_counts_for_seven_days_from_its_end(tmp_path: Path, days: float, opens: bool) -> None:
    path = smoke(tmp_path, days=days)
    found = look(tmp_path)
    assert found.open is opens
    if not opens:
        assert found.missing.startswith(f"{path.name}, of this configuration, passed, but ended ")


def test_one_that_did_not_pass_does_not_count_and_it_is_said_why(tmp_path: Path) -> None:
    smoke(tmp_path / "failed", code=1)
    assert look(tmp_path / "failed").missing.endswith("did not pass: exit code 1")
    # What it says of itself proves nothing: its stream is judged again.
    path = smoke(tmp_path, falls=False)
    assert "did not pass: DISPUTED" in look(tmp_path).missing
    (path / "events.jsonl").write_text("{\n")
    assert "cannot be read" in look(tmp_path).missing
    (path / "events.jsonl").unlink()
    assert "did not pass: CRASHED" in look(tmp_path).missing
    (path / EXIT).write_text("{")
    assert "an end that cannot be read" in look(tmp_path).missing
    (path / EXIT).unlink()
    assert f"kdconsole --headless attach {path.name}" in look(tmp_path).missing


def test_one_that_was_changed_since_does_not_count(tmp_path: Path) -> None:
    path = smoke(tmp_path)
    from dispatch.manifest import sha256_file

    write_sums(path, {name: sha256_file(path / name) for name in files_of(path)[0]})
    assert look(tmp_path).open
    with (path / "contract.yaml").open("a") as file:
        file.write("# another word\n")
    assert look(tmp_path).missing.endswith("was changed since it ended: contract.yaml: changed")


def test_it_counts_on_its_own_host_alone(tmp_path: Path) -> None:
    here = smoke(tmp_path)
    there = smoke(tmp_path, host="gx10", facts=FACTS, days=1.1)
    assert look(tmp_path).smoke == here.name
    assert look(tmp_path, host="gx10", facts=FACTS).smoke == there.name
    assert look(tmp_path, host="gx10").smoke == there.name
    other = look(tmp_path, host="lambda-vector")
    assert "of this configuration, ran on " in other.missing
    # The name is the same, the machine behind it is not.
    moved = look(tmp_path, host="gx10", facts=msgspec.structs.replace(FACTS, hostname="spark-2"))
    assert moved.missing.endswith("ran on gx10 when that was the machine spark-1, which is spark-2 now")


def test_one_of_another_machine_in_the_same_directory_is_none_of_this(tmp_path: Path) -> None:
    smoke(tmp_path, hostname="another-machine")
    assert look(tmp_path).missing.endswith("ran on another-machine")


def test_the_best_reason_is_told(tmp_path: Path) -> None:
    old = smoke(tmp_path, days=9)
    smoke(tmp_path, days=1, code=1)
    smoke(tmp_path, host="gx10")
    assert look(tmp_path).missing.startswith(f"{old.name}, of this configuration, passed, but ended 9 d 0 h ago")


def test_clocks_that_cannot_be_right_are_noted(tmp_path: Path) -> None:
    path = smoke(tmp_path, days=1)
    for ended in (NOW + 400 * DAY, 12.0):
        clock(path, ended=ended)
        found = look(tmp_path)
        assert found.open
        assert "which cannot be; taken is" in found.note
        assert found.ended is not None
        assert abs(found.ended - (NOW - DAY)) < 60
        assert found.note in found.told(NOW)
    clock(path, ended=NOW + 400 * DAY, made=NOW + 399 * DAY)
    found = look(tmp_path)
    assert found.open
    assert "in the future, so its age is not known" in found.note
    # A host whose clock is wrong makes an old smoke no younger.
    clock(path, ended=NOW + 400 * DAY, made=NOW - 30 * DAY)
    assert not look(tmp_path).open
    # So little is no nonsense.
    clock(path, ended=NOW + 100, made=NOW - 60)
    assert look(tmp_path).note == ""


# What asks it


@pytest.mark.parametrize(
    ("sets", "needed"),
    [
        (("train.steps=5000",), True),
        (("train.steps=4999",), False),
        (("train.max_steps=200",), False),
        (("train.max_steps=5000",), True),
    ],
)
def test_the_steps_that_will_be_trained_decide(tmp_path: Path, sets: tuple[str, ...], needed: bool) -> None:
    found = look(tmp_path, *sets)
    assert found.needed is needed
    assert found.open is not needed
    assert gate.look(load_config(template="builtin"), tmp_path).needed is False


def test_a_reason_opens_it_and_is_recorded_where_it_made_the_difference(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training of 50,000 steps on gx10: no smoke .* make it: COMMAND"):
        gate.require(look(tmp_path, host="gx10"), "COMMAND", None)
    for empty in ("", "  ", "\n"):
        with pytest.raises(ConfigError, match="--no-gate: empty"):
            gate.require(look(tmp_path), "COMMAND", empty)
    reason = gate.require(look(tmp_path), "COMMAND", " the demo\x1b is at nine\n")
    assert reason == ["no-gate: the demo\\x1b is at nine"]
    smoke(tmp_path)
    assert gate.require(look(tmp_path), "COMMAND", "the demo is at nine") == []


def test_no_directory_is_made_without_it_and_the_override_stands_in_the_manifest(tmp_path: Path) -> None:
    said: list[str] = []

    def make(job: Job) -> object:
        return asyncio.run(launch.make(job, Reach(), said.append))

    job = Job(training(), tmp_path / "evidence", smoke="COMMAND")
    with pytest.raises(ConfigError, match="make it: COMMAND; or --no-gate REASON"):
        make(job)
    assert not (tmp_path / "evidence").exists()
    make(Job(training(), tmp_path / "evidence", no_gate="a rehearsal"))
    [run] = (tmp_path / "evidence").iterdir()
    assert read_manifest(run).overrides == ["no-gate: a rehearsal"]
    passed = smoke(tmp_path / "others", days=(NOW - time.time()) / DAY + 0.5)
    make(Job(training(), tmp_path / "others", no_gate="not needed"))
    [made] = [each for each in (tmp_path / "others").iterdir() if each != passed]
    assert read_manifest(made).overrides == []
    assert said[-2].startswith(f"gate: {passed.name} passed on this machine 12 h")
    assert said[-1].startswith("--no-gate: not needed: ")


def test_the_command_line_refuses_with_the_command_that_makes_the_smoke(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.write("corpus.txt", "some text\n" * 5000)
    desk.write("my config.yaml", "teacher: builtin:teacher\nstudent: builtin:student\ndata: {path: corpus.txt}\n")
    given = ("my config.yaml", "--set", "train.batch=2", "--teacher", "builtin:teacher", "--evidence", "runs")
    line = desk.call("--headless", "train", *given).refused("no passed smoke", "50,000 steps", "--no-gate REASON")
    command = line.partition("make it: ")[2].partition("; or ")[0]
    assert shlex.split(command) == [
        *("kdconsole", "--headless", "smoke", "my config.yaml", "--teacher", "builtin:teacher"),
        *("--set", "train.batch=2", "--evidence", "runs"),
    ]
    desk.call("--headless", "train", *given, "--no-gate", " ").refused("--no-gate: empty")
    short = desk.call("--headless", "train", *given, "--max-steps", "20", "--dry-run")
    assert short.rc == 0, short.said
    assert "not asked for below 5,000 steps" in short.text


# The screen's checks are the same


def test_what_a_start_would_refuse_is_a_failed_check(tmp_path: Path) -> None:
    draft = Draft("train", sets="train.steps=50000")
    closed = prepare(draft, tmp_path, {})
    [check] = [each for each in closed.checks if each.name == "smoke"]
    assert check.outcome == "FAIL"
    assert "wants one that passed on this machine; no smoke of this configuration" in check.text
    assert closed.gate_closed
    [check] = [each for each in prepare(Draft("train"), tmp_path, {}).checks if each.name == "smoke"]
    assert check.outcome == "UNKNOWN"
    path = smoke(tmp_path, days=(NOW - time.time()) / DAY + 1)
    opened = prepare(draft, tmp_path, {})
    [check] = [each for each in opened.checks if each.name == "smoke"]
    assert (check.outcome, opened.gate_closed) == ("PASS", False)
    assert check.text.startswith(f"{path.name} passed on this machine")
    assert prepare(Draft("smoke"), tmp_path, {}).gate is None


def test_a_draft_for_a_host_is_looked_at_there_when_it_starts(tmp_path: Path) -> None:
    sets = "train.steps=50000 teacher=gx10:/models/big student=gx10:~/small"
    prepared = prepare(Draft("train", sets=sets, host="gx10"), tmp_path, {})
    assert prepared.refusals == ()
    outcomes = {each.name: each.outcome for each in prepared.checks}
    passed = dict.fromkeys(("contract", "teacher", "student", "data"), "PASS")
    assert outcomes == {**passed, "gx10": "PENDING"}
    assert not prepared.complete
    assert prepared.room is None
    assert prepare(Draft("train", sets=sets), tmp_path, {}).refusals != ()


def test_the_command_of_a_draft(tmp_path: Path) -> None:
    draft = Draft("train", None, Path("a b.yaml"), "train.batch=2 'data.glob=*.x y'", "gx10")
    assert shlex.split(smoke_command(draft, tmp_path)) == [
        *("kdconsole", "--headless", "smoke", "a b.yaml", "--set", "train.batch=2", "--set", "data.glob=*.x y"),
        *("--host", "gx10", "--evidence", str(tmp_path)),
    ]
    assert smoke_command(Draft("train", "gx10"), tmp_path) == ""
