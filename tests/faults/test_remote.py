"""Runs on another host, by the real command over a real sshd: the same numbers, found again, stopped, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dispatch.hosts import add_host
from dispatch.manifest import Manifest, read_manifest, sha256_file
from dispatch.sums import check_sums, read_sums
from engine.formats import resolve_builtin
from tests import ssh_rig
from tests.console_rig import Desk, Outcome, RunFiles, processes_of, until, write_corpus
from tests.nursery import Nursery
from tests.problem_files import suite_of

pytestmark = pytest.mark.skipif(ssh_rig.MISSING is not None and "CI" not in os.environ, reason=str(ssh_rig.MISSING))
FORKING = "gx11"
"""The same host by another name: its engines are forked."""
SECRET = "hush-hush-hush-0123456789"
CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: corpus.txt, heldout_windows: 4}
train: {steps: 4000, batch: 2, sequence: 32, threads: 1, warmup_steps: 5, learning_rate: 1.0e-3}
checkpoint: {every_steps: 50, keep_last: 2}
"""


@dataclass
class Afar:
    """A desk, and a host that it reaches."""

    desk: Desk
    rig: ssh_rig.Rig
    base: Path

    def call(self, *arguments: str) -> Outcome:
        return self.desk.call(*arguments, variables=self.variables)

    @property
    def variables(self) -> dict[str, str]:
        names = ("HOME", "KDCONSOLE_HOSTS")
        return {name: self.rig.environ[name] for name in names} | {"KD_TOKEN": SECRET}

    def there(self, run: RunFiles) -> RunFiles:
        """The same run's directory on the host."""
        return RunFiles(self.base / "runs" / run.path.name)


@pytest.fixture(scope="module")
def afar(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Afar]:
    root = tmp_path_factory.mktemp("afar")
    desk, base = Desk(root), root / "base"
    write_corpus(desk.cwd / "corpus.txt")
    desk.write("config.yaml", CONFIG)
    (root / "host").mkdir()
    with ssh_rig.running_sshd(root / "host") as rig:
        given = {"address": "127.0.0.1", "port": rig.port, "identity": str(rig.identity)}
        host = {**given, "run_dir": str(base), "env": ["KD_TOKEN"]}
        add_host("gx10", {**host, "python": sys.executable}, rig.environ)
        add_host(FORKING, {**host, "python": str(nursery.python(root / "python"))}, rig.environ)
        afar = Afar(desk, rig, base)
        key = rig.key.get_fingerprint("sha256")
        for name in ("gx10", FORKING):
            trusted = afar.call("hosts", "trust", name, "--fingerprint", key)
            assert trusted.rc == 0, trusted.said
        try:
            yield afar
        finally:
            for pid in processes_of(base):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            desk.clear()


class Exposed:
    """Looks, while inside, who has the secret: in its environment, as it should, or for everybody in its arguments."""

    def __init__(self) -> None:
        self.environments: set[str] = set()
        self.arguments: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Exposed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            for entry in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    told = Path(f"/proc/{entry}/cmdline").read_bytes()
                    if SECRET.encode() in told:
                        self.arguments.add(told)
                    if b"\0engine\0" in told and SECRET.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                        self.environments.add(entry)


def test_a_smoke_on_a_host_has_the_numbers_of_the_same_smoke_here(afar: Afar, tmp_path: Path) -> None:
    arguments = ("--headless", "smoke", "config.yaml", "--max-steps", "12", "--set", "train.seed=3")
    with Exposed() as exposed:
        away = afar.call(*arguments, "--host", "gx10", "--evidence", str(tmp_path / "away"), "--name", f"for {SECRET}")
    assert away.rc == 0, away.said
    assert "GO max_steps is reached" in away.text
    here = afar.call(*arguments, "--evidence", str(tmp_path / "here"))
    assert here.rc == 0, here.said
    [path] = (tmp_path / "away").iterdir()
    [other] = (tmp_path / "here").iterdir()
    keep = ("step", "loss", "ce", "kd", "lr", "grad_norm", "tokens")
    ours, theirs = (
        [{key: event[key] for key in keep} for event in RunFiles(each).events("step")] for each in (path, other)
    )
    assert ours == theirs
    assert len(ours) == 12
    small = ("events.jsonl", "launch.log", "supervisor.jsonl", "exit.json", "dispatch.json", "config.yaml")
    for name in (*small, "SHA256SUMS"):
        assert (path / name).read_bytes() == (afar.base / "runs" / path.name / name).read_bytes(), name
    assert str(afar.base / "store") in (path / "config.yaml").read_text()
    evidence = check_sums(path)
    assert (evidence.problems, evidence.absent) == ((), ())
    assert f"evidence id {evidence.evidence_id}" in away.text
    is_whole(read_manifest(path), read_manifest(other))
    # The operator typed the secret as a name, so it stood in that one command line; nowhere else, and in no file.
    assert exposed.environments, "the trainer was to have the variable"
    assert [line for line in exposed.arguments if f"for {SECRET}".encode() not in line] == []
    places = (path, other, afar.base, afar.rig.directory, afar.desk.cwd)
    files = [file for place in places for file in place.rglob("*") if file.is_file() and not file.is_symlink()]
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    afar.rig.end()
    try:
        offline = afar.call("--headless", "attach", str(path), "--json")
        assert offline.rc == 0, offline.said
        assert json.loads(offline.out)["evidence_id"] == evidence.evidence_id
    finally:
        afar.rig.restart()


def is_whole(away: Manifest, here: Manifest) -> None:
    """The manifests of one smoke on a host and here: complete, and from the same engine, models and data."""
    for each in (away, here):
        assert each.outcome is not None
        assert (each.outcome.status, each.outcome.exit_code, each.outcome.steps) == ("COMPLETED", 0, 12)
        assert [(attempt.number, attempt.end) for attempt in each.attempts] == [(1, "exit code 0")]
        assert set(each.inputs) == {"teacher", "student", "tokenizer", "data"}
        assert each.ran_on is not None
        assert each.ran_on.hostname == platform.node()
        assert each.ran_on.torch
        assert each.ran_on.torch.partition("+")[0] == each.engine_versions["torch"].partition("+")[0]
        assert each.ran_as == each.operator
        assert all(verdict.verdict == "PASS" for verdict in each.verdicts if verdict.severity != "warn")
    assert (away.inputs, away.engine_sha256) == (here.inputs, here.engine_sha256)
    assert away.remote is not None
    assert away.remote.env == ("KD_TOKEN",)
    assert away.name == "for [redacted]"


def test_a_training_is_left_found_stopped_and_resumed_through_lost_connections(afar: Afar) -> None:
    watching = afar.desk.start("--headless", "train", "config.yaml", "--host", FORKING, variables=afar.variables)
    run = afar.desk.run
    until(lambda: run.has("step"), "the first steps of it here")
    for pid in afar.rig.sessions():
        os.kill(pid, signal.SIGKILL)
    killed = max(event["step"] for event in run.events("step"))
    until(lambda: run.events("step")[-1]["step"] > killed + 60, "steps that were made after the connection was lost")
    until(lambda: run.has("checkpoint"), "a checkpoint")
    watching.interrupt()
    left = watching.wait()
    assert left.rc == 0, left.said
    assert "the run goes on" in left.err
    listed = afar.call("runs")
    assert f"{run.path.name}" in listed.out
    assert f"{FORKING}  running" in listed.out
    stopped = afar.call("stop", run.path.name)
    assert stopped.rc == 0, stopped.said
    assert "CANCELLED: exit code 130" in stopped.out
    assert not processes_of(afar.base / "runs"), "something of it is left behind"
    attached = afar.call("--headless", "attach", run.path.name)
    assert attached.rc == 130, attached.said
    assert run.stream.read_bytes() == afar.there(run).stream.read_bytes()
    assert run.end["status"] == "STOPPED"
    first = check_sums(run.path)
    assert first.problems == ()
    sums = read_sums(run.path).files
    there = {name: sha256_file(afar.there(run).path / name) for name in first.absent}
    assert "checkpoints/LATEST" in there
    assert there == {name: sums[name] for name in there}
    before = max(event["step"] for event in run.events("checkpoint"))

    resumed = afar.desk.start("--headless", "train", "--resume", run.path.name, variables=afar.variables)
    until(lambda: len(run.events("run")) == 2 and run.events()[-1]["event"] == "step", "steps of the second attempt")
    assert afar.call("stop", run.path.name).rc == 0
    ended = resumed.wait()
    assert ended.rc == 130, ended.said
    events = run.events()
    assert [event["seq"] for event in events] == list(range(len(events)))
    again = check_sums(run.path)
    assert again.problems == ()
    assert again.evidence_id != first.evidence_id
    assert {"exit-1.json", "resume.json"} < set(read_sums(run.path).files)
    assert [attempt.end for attempt in read_manifest(run.path).attempts] == ["exit code 130"] * 2
    second = events[[number for number, event in enumerate(events) if event["event"] == "run"][1] :]
    assert next(event["step"] for event in second if event["event"] == "step") == before + 1
    assert run.stream.read_bytes() == afar.there(run).stream.read_bytes()


def test_what_is_on_the_host_already_is_named_and_not_sent(afar: Afar, tmp_path: Path) -> None:
    data = f"{FORKING}:{afar.desk.cwd / 'corpus.txt'}"
    arguments = ("--headless", "smoke", "config.yaml", "--max-steps", "10", "--data", data)
    here = afar.call(*arguments, "--evidence", str(tmp_path / "here"))
    assert here.rc == 2, here.said
    assert "is on another machine; expected a path of this one; run it there: --host" in here.err
    away = afar.call(*arguments, "--host", FORKING, "--evidence", str(tmp_path / "away"))
    assert away.rc == 0, away.said
    [path] = (tmp_path / "away").iterdir()
    assert str(afar.desk.cwd / "corpus.txt") in (path / "config.yaml").read_text()
    nowhere = (f"{FORKING}:/nowhere", "--host", FORKING)
    missing = afar.call(*arguments[:-1], *nowhere, "--evidence", str(tmp_path / "missing"))
    assert missing.rc == 2, missing.said
    assert f"{FORKING}:/nowhere: no such file or directory there" in missing.err


def test_an_evaluation_on_a_host_has_the_answers_of_the_same_one_here(
    afar: Afar, tmp_path: Path, nursery: Nursery
) -> None:
    suite = suite_of(afar.desk.cwd / "own.jsonl")
    model = shutil.copytree(resolve_builtin("builtin:teacher"), afar.desk.cwd / "model")
    more = ("--suite", "own.jsonl", "--run-generated-code", "--max-new-tokens", "16", "--set", "train.threads=1")
    arguments = ("--headless", "evaluate", "model", *more)
    away = afar.call(*arguments, "--host", FORKING, "--evidence", str(tmp_path / "away"))
    assert away.rc == 0, away.said
    forked = {**afar.variables, "PYTHONPATH": nursery.python_path}
    here = afar.desk.call(*arguments, "--evidence", str(tmp_path / "here"), variables=forked)
    assert here.rc == 0, here.said
    [path] = (tmp_path / "away").iterdir()
    [other] = (tmp_path / "here").iterdir()
    there = afar.base / "runs" / path.name
    for name in ("problems.jsonl", "completions.jsonl", "results.jsonl", "dispatch.json", "SHA256SUMS"):
        assert (path / name).read_bytes() == (there / name).read_bytes(), name
    assert (there / "problems.jsonl").read_bytes() == suite.read_bytes()
    assert (path / "completions.jsonl").read_bytes() == (other / "completions.jsonl").read_bytes()
    judged = [
        [(row["task"], row["passed"], row["outcome"], row["detail"]) for row in map(json.loads, lines)]
        for lines in ((each / "results.jsonl").read_text().splitlines() for each in (path, other))
    ]
    assert sorted(judged[0]) == sorted(judged[1])
    assert len(judged[0]) == 3
    assert check_sums(path).problems == ()
    ours, theirs = read_manifest(path), read_manifest(other)
    assert ours.evaluated == theirs.evaluated
    assert ours.evaluated is not None
    assert (ours.evaluated.model, ours.evaluated.run) == (str(model), None)
    assert ours.inputs == theirs.inputs
    named = (f"{FORKING}:{model}", *more, "--host", FORKING, "--dry-run", "--json")
    told = afar.call("--headless", "evaluate", *named, "--evidence", str(tmp_path / "none"))
    assert told.rc == 0, told.said
    [used] = [step for step in json.loads(told.out)["steps"] if step["step"] == "use"]
    assert used["to"] == str(model), "it was to be taken where it is"


def test_a_host_that_nobody_knows_is_one_clear_message(afar: Afar, tmp_path: Path) -> None:
    told = afar.call("--headless", "smoke", "--host", "-oProxyCommand=x", "--evidence", str(tmp_path / "none"))
    assert told.rc == 2
    assert "no host's name" in told.err
    afar.rig.end()
    try:
        told = afar.call("--headless", "smoke", "--host", "gx10", "--evidence", str(tmp_path / "none"))
    finally:
        afar.rig.restart()
    assert told.rc == 3, told.said
    assert "error: gx10: " in told.err
    assert "Traceback" not in told.err
    assert not (tmp_path / "none").exists()
