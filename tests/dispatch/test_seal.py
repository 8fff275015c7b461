"""The evidence of a run is completed at its end: by whom, how often and after whatever was cut off."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from dispatch_rig import ROOT, until

from dispatch import runs
from dispatch import seal as sealing
from dispatch.manifest import CONFIG, EXIT, MANIFEST, SUMS, read_manifest
from dispatch.places import Place
from dispatch.redaction import REDACTED, redact
from dispatch.runs import RunDir, open_run
from dispatch.seal import Sealed, reopen, seal
from dispatch.sums import check_sums
from dispatch.transport import LocalTransport
from engine.config import load_config
from engine.errors import RunError
from engine.falsifiers import builtin_contract
from engine.stream import End, Inputs, Phase, encode
from tests.streams import end_event, smoke_events, stamped, with_verdicts

DIGESTS = {"teacher": "1" * 64, "student": "2" * 64, "tokenizer": "3" * 64, "data": "4" * 64}
TRAINER = """
import os, pathlib, sys
given = pathlib.Path(sys.argv[1])
with open('events.jsonl', 'ab') as file: file.write(given.read_bytes())
pathlib.Path('checkpoints').mkdir(exist_ok=True)
with open('checkpoints/weights.safetensors', 'wb') as file: os.truncate(file.fileno(), 2 << 20)
pathlib.Path('model').mkdir(exist_ok=True)
pathlib.Path('model/config.json').write_text('{}')
print('a line of the log')
sys.stdout.flush()
exec(sys.argv[2])
"""
SEAL = """
import asyncio, sys
from pathlib import Path
from dispatch import seal
from dispatch.places import Place
from dispatch.runs import open_run
from dispatch.transport import LocalTransport
seal.TELL_SECONDS = 0.0
run = open_run(Path(sys.argv[1]))
asyncio.run(seal.seal(run, Place(LocalTransport(), sys.argv[1]), lambda text: print(text, flush=True)))
"""


class Desk:
    """Runs of this machine whose trainer is a few lines, under the real supervisor."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.given = root / "events"

    def make(self) -> RunDir:
        config = load_config(None, template="builtin")
        return runs.create_run(config, evidence=self.root / "evidence", contract_text=builtin_contract("smoke"))

    def events(self, made: RunDir, *, end: bool = True, first: int = 0) -> None:
        """What the next attempt writes to its stream."""
        events = [
            each for each in with_verdicts(smoke_events(12), end=end_event(12)) if end or not isinstance(each, End)
        ]
        events = stamped([*events[:3], Inputs(digests=DIGESTS), *events[3:]])
        lines = [encode(msgspec.structs.replace(each, run=made.run, seq=first + each.seq)) for each in events]
        self.given.write_bytes(b"".join(lines))

    def launch(self, made: RunDir, last: str = "sys.exit(0)", *, again: bool = False) -> None:
        command = [sys.executable, "-I", "-S", "-c", TRAINER, str(self.given), last]
        place = Place(LocalTransport(), str(made.path), command=tuple(command))
        asyncio.run(place.launch(gpu=False, again=again))

    def ended(self, made: RunDir, last: str = "sys.exit(0)", *, again: bool = False) -> RunDir:
        self.launch(made, last, again=again)
        until((made.path / EXIT).exists, "the end of the run")
        return made


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def ended(desk: Desk) -> RunDir:
    """A run that is over and not sealed."""
    made = desk.make()
    desk.events(made)
    return desk.ended(made)


def sealed(run_dir: RunDir) -> Sealed:
    return asyncio.run(seal(run_dir, Place(LocalTransport(), str(run_dir.path))))


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# What is written


def test_the_manifest_says_what_the_files_of_the_run_say(ended: RunDir) -> None:
    before = read_manifest(ended.path)
    assert (before.outcome, before.attempts, before.verdicts) == (None, (), ())
    found = sealed(ended)
    assert (found.new, found.problems, found.absent) == (True, (), ())
    manifest = read_manifest(ended.path)
    record = json.loads((ended.path / EXIT).read_text())
    assert manifest.outcome is not None
    assert (manifest.outcome.status, manifest.outcome.exit_code, manifest.outcome.steps) == ("COMPLETED", 0, 12)
    assert manifest.outcome.reason == "the time budget is reached"
    [attempt] = manifest.attempts
    assert (attempt.number, attempt.started, attempt.ended) == (1, record["started"], record["ended"])
    assert attempt.end == "exit code 0"
    assert (manifest.started, manifest.ended) == (record["started"], record["ended"])
    assert manifest.seconds == pytest.approx(record["seconds"], abs=1e-3)
    assert manifest.inputs == DIGESTS
    assert manifest.device == "cpu Some CPU, fp32"
    assert manifest.engine_versions == {"torch": "2.13.0"}
    assert {v.id: v.verdict for v in manifest.verdicts}["F-FINITE-001"] == "PASS"
    assert all(v.expected and v.observed for v in manifest.verdicts)
    # And what was known at its beginning is as it was.
    for name in ("run", "id", "mode", "created", "operator", "ran_as", "ran_on", "engine_sha256", "config_fingerprint"):
        assert getattr(manifest, name) == getattr(before, name), name
    assert manifest.ran_on is not None
    assert manifest.ran_on.memory_total
    assert manifest.operator == manifest.ran_as
    assert len(manifest.engine_sha256 or "") == 64


def test_every_file_is_listed_and_sha256sum_agrees(ended: RunDir) -> None:
    found = sealed(ended)
    names = [line.split("  ")[1] for line in (ended.path / SUMS).read_text().splitlines()]
    there = {str(path.relative_to(ended.path)) for path in ended.path.rglob("*") if path.is_file()}
    assert set(names) == there - {SUMS, ".lock"}
    assert "checkpoints/weights.safetensors" in names
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=ended.path, check=True, capture_output=True)
    assert check_sums(ended.path).evidence_id == found.evidence_id


def test_sealing_twice_changes_nothing(ended: RunDir) -> None:
    first = sealed(ended)
    before = contents(ended.path)
    second = sealed(ended)
    assert contents(ended.path) == before
    assert (second.evidence_id, second.new, second.problems) == (first.evidence_id, False, ())
    (ended.path / "launch.log").write_text("others\n")
    assert sealed(ended).problems == ("launch.log: changed",)


def test_two_consoles_at_once_make_one_seal(ended: RunDir) -> None:
    async def both() -> tuple[Sealed, Sealed]:
        place = Place(LocalTransport(), str(ended.path))
        return await asyncio.gather(seal(ended, place), seal(ended, place))

    one, other = asyncio.run(both())
    assert sorted((one.new, other.new)) == [False, True]
    assert one.evidence_id == other.evidence_id


def test_what_cannot_be_listed_is_told_and_stays_a_problem(ended: RunDir) -> None:
    (ended.path / "model" / "link").symlink_to("/etc/passwd")
    assert sealed(ended).problems == ("model/link: not a regular file of this directory",)
    assert sealed(ended).problems == ("model/link: not a regular file of this directory",)


@pytest.mark.parametrize(
    ("last", "end", "status", "code", "number", "reason"),
    [
        ("sys.exit(130)", False, "STOPPED", 130, None, "exit code 130, without an end event"),
        ("os.kill(os.getpid(), 9)", False, "CRASHED", None, 9, "killed by SIGKILL, without an end event"),
        ("sys.exit(1)", True, "COMPLETED", 1, None, "the time budget is reached"),
    ],
)
def test_the_outcome_is_what_the_run_and_its_supervisor_say(
    desk: Desk, last: str, end: bool, status: str, code: int | None, number: int | None, reason: str
) -> None:
    made = desk.make()
    desk.events(made, end=end)
    sealed(desk.ended(made, last))
    outcome = read_manifest(made.path).outcome
    assert outcome is not None
    assert (outcome.status, outcome.exit_code, outcome.signal) == (status, code, number)
    assert (outcome.reason, outcome.steps) == (reason, 12)


def test_a_stream_that_nobody_can_read_leaves_the_rest(desk: Desk) -> None:
    made = desk.make()
    desk.given.write_bytes(b'{"v": 1, "run"\n\xff\xfe\n' + b"x" * (1 << 20) + b"\n" + b'{"event":"end"')
    sealed(desk.ended(made, "sys.exit(3)"))
    manifest = read_manifest(made.path)
    assert manifest.outcome is not None
    assert (manifest.outcome.status, manifest.outcome.exit_code) == ("CRASHED", 3)
    assert manifest.verdicts == ()
    assert check_sums(made.path).problems == ()


def test_an_attempt_that_ended_without_a_word_is_not_described_by_the_one_before(desk: Desk) -> None:
    made = desk.make()
    desk.events(made)
    desk.ended(made, "sys.exit(130)")
    desk.given.write_bytes(encode(Phase(name="import", run=made.run, seq=1000)))
    desk.launch(made, "os.kill(os.getpid(), 9)", again=True)
    until((made.path / EXIT).exists, "the end of the second attempt")
    sealed(made)
    outcome = read_manifest(made.path).outcome
    assert outcome is not None
    assert (outcome.status, outcome.signal, outcome.steps) == ("CRASHED", 9, 12)


def test_what_the_journal_misses_is_taken_from_the_exit_record(ended: RunDir) -> None:
    record = json.loads((ended.path / EXIT).read_text())
    journal = (ended.path / "supervisor.jsonl").read_text().splitlines(keepends=True)
    (ended.path / "supervisor.jsonl").write_text("".join(line for line in journal if '"exited"' not in line))
    sealed(ended)
    [attempt] = read_manifest(ended.path).attempts
    assert (attempt.started, attempt.ended, attempt.end) == (record["started"], record["ended"], "exit code 0")


# When


def test_a_run_that_goes_on_is_not_sealed(desk: Desk) -> None:
    made = desk.make()
    desk.events(made)
    desk.launch(made, "import time; time.sleep(600)")
    with pytest.raises(RunError, match=rf"run {made.id}: running; expected one that has ended; kdconsole stop"):
        sealed(made)
    assert not (made.path / SUMS).exists()
    asyncio.run(Place(LocalTransport(), str(made.path)).stop(grace=0, kill=True))
    assert sealed(made).new


def test_a_run_whose_supervisor_was_killed_is_lost(desk: Desk) -> None:
    made = desk.make()
    desk.events(made, end=False)
    desk.launch(made, "import time; time.sleep(600)")
    lines = [json.loads(line) for line in (made.path / "supervisor.jsonl").read_text().splitlines()]
    started = next(line for line in lines if line["event"] == "started")
    for who in ("supervisor", "trainer"):
        os.kill(started[who]["pid"], signal.SIGKILL)
    until(lambda: sealed_or_not(made), "the run to be lost")
    manifest = read_manifest(made.path)
    assert manifest.outcome is not None
    assert (manifest.outcome.status, manifest.outcome.exit_code) == ("LOST", None)
    assert (manifest.ended, manifest.seconds) == (None, None)
    [attempt] = manifest.attempts
    assert (attempt.ended, attempt.end) == (None, None)
    assert attempt.started == pytest.approx(lines[0]["t"])


def sealed_or_not(made: RunDir) -> bool:
    try:
        return sealed(made).new
    except RunError:
        return False


def test_another_attempt_takes_the_seal_back_and_its_end_makes_it_anew(desk: Desk) -> None:
    made = desk.make()
    desk.events(made, end=False)
    sealed(desk.ended(made, "sys.exit(130)"))
    desk.events(made, first=1000)
    desk.launch(made, "import time; time.sleep(600)", again=True)
    reopen(made)
    assert not (made.path / SUMS).exists()
    manifest = read_manifest(made.path)
    assert (manifest.outcome, manifest.ended, manifest.attempts, manifest.verdicts) == (None, None, (), ())
    asyncio.run(Place(LocalTransport(), str(made.path)).stop(grace=0, kill=True))
    assert sealed(made).new
    manifest = read_manifest(made.path)
    assert [(each.number, each.end) for each in manifest.attempts] == [(1, "exit code 130"), (2, "killed by SIGTERM")]
    assert manifest.started == manifest.attempts[0].started
    assert "exit-1.json" in (made.path / SUMS).read_text()
    assert check_sums(made.path).problems == ()


def test_a_run_that_is_started_again_while_it_is_sealed_is_not_sealed(
    desk: Desk, ended: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "TELL_SECONDS", 0.0)
    once: list[str] = []

    def resume(text: str) -> None:
        """Called in the middle of the hashing."""
        if not once:
            once.append(text)
            thread = threading.Thread(target=desk.launch, args=(ended, "sys.exit(0)"), kwargs={"again": True})
            thread.start()
            thread.join()

    with pytest.raises(RunError, match="it was started again meanwhile; expected a run that has ended"):
        asyncio.run(seal(ended, Place(LocalTransport(), str(ended.path)), resume))
    assert once[0].startswith("hashing ")
    assert not (ended.path / SUMS).exists()
    assert read_manifest(ended.path).outcome is None
    until((ended.path / EXIT).exists, "the second end")
    assert sealed(ended).new


def test_a_console_that_is_killed_while_it_seals_leaves_nothing_half(ended: RunDir, tmp_path: Path) -> None:
    os.truncate(
        ended.path / "checkpoints/weights.safetensors", 128 << 20
    )  # to take a while; the disk has nothing of it
    untouched = tmp_path / "copy" / ended.path.name
    untouched.parent.mkdir()
    subprocess.run(["cp", "-a", "--sparse=always", ended.path, untouched], check=True)
    console = subprocess.Popen(
        [sys.executable, "-c", SEAL, str(ended.path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert console.stdout is not None
    assert console.stdout.readline().startswith(b"hashing ")
    console.kill()
    console.wait()
    assert not (ended.path / SUMS).exists()
    assert read_manifest(ended.path).outcome is not None
    after, straight = sealed(ended), sealed(open_run(untouched))
    assert (after.new, after.problems) == (True, ())
    assert after.evidence_id == straight.evidence_id


def test_ctrl_c_while_large_weights_are_hashed_ends_the_console_and_leaves_it_to_the_next(ended: RunDir) -> None:
    os.truncate(ended.path / "checkpoints/weights.safetensors", 1 << 40)  # nobody waits for that; the disk has nothing
    console = subprocess.Popen(
        [sys.executable, "-m", "console", "--headless", "attach", str(ended.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        until(lambda: read_manifest(ended.path).outcome is not None, "the manifest, which comes before the hashes", 60)
        console.send_signal(signal.SIGINT)
        said, _ = console.communicate(timeout=60)
    finally:
        console.kill()
    assert "the evidence is not complete: interrupted; later: kdconsole --headless attach" in said
    assert "COMPLETED" in said or "GO" in said  # the report is printed all the same
    assert "evidence id" not in said
    assert not (ended.path / SUMS).exists()
    os.truncate(ended.path / "checkpoints/weights.safetensors", 1 << 20)
    assert sealed(ended).new


def test_a_directory_that_cannot_be_written_is_one_clear_error(ended: RunDir) -> None:
    (ended.path / f".{SUMS}.tmp").mkdir()
    with pytest.raises(RunError, match=r"cannot write the checksums: Is a directory.*free some space"):
        sealed(ended)
    (ended.path / f".{SUMS}.tmp").rmdir()
    (ended.path / CONFIG).unlink()
    with pytest.raises(RunError, match=r"config\.yaml: No such file.*expected a run directory"):
        sealed(ended)


# Secrets


def test_no_secret_of_the_environment_is_in_any_file(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hush-hush-hush-1234"
    monkeypatch.setenv("HF_TOKEN", secret)
    config = load_config(None, template="builtin")
    made = runs.create_run(
        config,
        evidence=desk.root / "evidence",
        contract_text="falsifiers: []\n",
        name=f"with {secret}",
        overrides=["room", f"no-gate: {secret} is why"],
    )
    desk.events(made)
    sealed(desk.ended(made))
    manifest = read_manifest(made.path)
    assert manifest.name == f"with {REDACTED}"
    assert manifest.overrides == ["room", f"no-gate: {REDACTED} is why"]
    found = [path for path in made.path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert found == []
    assert "hush" not in (made.path / MANIFEST).read_text()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("see hf_abcdefghijKLMNOPqrstuv there", f"see {REDACTED} there"),
        ("https://me:pass@host/x", f"https://{REDACTED}@host/x"),
        ("HF_TOKEN=abcdefgh x", f"HF_TOKEN={REDACTED} x"),
        ("Bearer abcdefghijkl", f"Bearer {REDACTED}"),
        ("AKIAABCDEFGHIJKLMNOP", REDACTED),
        ("nats per labelled token: 3.25", "nats per labelled token: 3.25"),
        ("tokens=512, F-DISTILL-TEACHER-002", "tokens=512, F-DISTILL-TEACHER-002"),
        ("smaller learning rate after a sk-learn idea", "smaller learning rate after a sk-learn idea"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out_and_nothing_else(text: str, kept: str) -> None:
    assert redact(text, {}) == kept
    assert redact("short abc", {"A_TOKEN": "abc"}) == "short abc"
    assert redact("in /home/me/key.pem", {"MY_API_KEY": "/home/me/key.pem"}) == "in /home/me/key.pem"
