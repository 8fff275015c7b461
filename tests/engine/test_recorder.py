"""Where everything of a run goes: stream, verdicts, human lines and heartbeat, whatever the main thread does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine import recorder as recorder_module
from engine.contract import parse_contract
from engine.errors import ExitCode
from engine.falsifiers import FAIL, JUDGE_PHASE, PASS, Judge
from engine.human import human_lines
from engine.recorder import Recorder, peak_rss_bytes
from engine.stream import End, Event, Heartbeat, Log, Measure, Phase, Run, Verdict, Vitals, decode_line
from tests.streams import RUN, end_event, run_event, smoke_contract, smoke_events, step_event

ROOT = Path(__file__).parents[2]
FATAL = """
version: 1
name: test
falsifiers:
  - {id: F-WARN-1, claim: c, kind: threshold, metric: step.loss, below: 5, severity: warn}
  - {id: F-GATE-1, claim: c, kind: threshold, metric: step.loss, below: 4}
  - {id: F-FATAL-1, claim: c, kind: threshold, metric: step.loss, below: 3, severity: fatal}
  - {id: F-FATAL-2, claim: c, kind: threshold, metric: step.ce, below: 3, severity: fatal}
"""


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def read(path: Path) -> list[Event]:
    events = [decode_line(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [event for event in events if event is not None]


def eventually(found: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What `found` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return value


@pytest.fixture
def recorder(stream: Path) -> Iterator[Recorder]:
    made = Recorder(stream, RUN, smoke_contract())
    yield made
    made.finish(end_event())


def test_a_verdict_follows_the_event_that_changed_it(stream: Path, recorder: Recorder) -> None:
    for event in smoke_events(10):
        recorder.emit(event)
    events = read(stream)
    assert [event.seq for event in events] == list(range(len(events)))
    for before, verdict in pairwise(events):
        if isinstance(verdict, Verdict) and verdict.id == "F-DISTILL-KDSTEP-001":
            assert isinstance(before, Measure)
            assert before.name == "ce_gradient_error"
    closing = next(i for i, e in enumerate(events) if isinstance(e, Phase) and e.name == JUDGE_PHASE)
    assert all(isinstance(event, Verdict) for event in events[closing + 1 :])
    assert len(events) - closing - 1 == 6
    assert {v.id: v.verdict for v in recorder.verdicts} == {
        event.id: event.verdict for event in events if isinstance(event, Verdict)
    }


def test_the_first_fatal_failure_is_kept_and_others_are_not_fatal(stream: Path) -> None:
    recorder = Recorder(stream, RUN, parse_contract(FATAL, "test"))
    recorder.emit(run_event())
    recorder.emit(step_event(1, 4.5))
    assert recorder.fatal is not None
    assert recorder.fatal.id == "F-FATAL-1"
    stated = [(e.id, e.verdict) for e in read(stream) if isinstance(e, Verdict)]
    assert stated == [("F-WARN-1", PASS), ("F-GATE-1", FAIL), ("F-FATAL-1", FAIL), ("F-FATAL-2", FAIL)]
    recorder.finish(end_event())


def test_a_gate_that_fails_is_not_fatal(stream: Path) -> None:
    recorder = Recorder(stream, RUN, parse_contract(FATAL.replace("severity: fatal", "severity: gate"), "test"))
    recorder.emit(run_event())
    recorder.emit(step_event(1, 9.0))
    assert recorder.fatal is None
    recorder.finish(end_event())


def test_nothing_follows_the_end(stream: Path) -> None:
    recorder = Recorder(stream, RUN, smoke_contract())
    recorder.start_heartbeat(None, time.monotonic())
    assert recorder.finish(end_event())
    content = stream.read_bytes()
    recorder.log("too late")
    recorder.emit(step_event(1, 1.0))
    assert not recorder.finish(end_event())
    assert stream.read_bytes() == content
    assert isinstance(read(stream)[-1], End)


def test_only_one_end_is_written_whoever_ends_the_run(stream: Path) -> None:
    recorder = Recorder(stream, RUN, smoke_contract())
    barrier = threading.Barrier(8)
    ended: list[bool] = []

    def end() -> None:
        barrier.wait()
        ended.append(recorder.finish(end_event()))

    threads = [threading.Thread(target=end) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == [False] * 7 + [True]
    assert sum(isinstance(event, End) for event in read(stream)) == 1


def test_the_first_heartbeat_is_there_at_once_and_says_phase_step_and_memory(stream: Path, recorder: Recorder) -> None:
    recorder.enter("import")
    recorder.emit(step_event(3, 1.0))
    recorder.start_heartbeat(None, time.monotonic())
    [beat] = [event for event in read(stream) if isinstance(event, Heartbeat)]
    assert (beat.phase, beat.step) == ("import", 3)
    assert 1 << 20 < beat.rss_bytes <= peak_rss_bytes()
    assert beat.host_free_bytes is not None
    assert beat.device_used_bytes is None


def test_heartbeats_come_at_their_interval(stream: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "HEARTBEAT_SECONDS", 0.1)
    recorder.start_heartbeat(None, time.monotonic())

    def beats() -> list[Event]:
        return [event for event in read(stream) if isinstance(event, Heartbeat)]

    seen = eventually(lambda: beats() if len(beats()) >= 6 else None)
    assert seen[-1].t - seen[0].t > 0.09 * (len(seen) - 1) - 0.1  # one of them may have come late, none early


def test_the_devices_memory_is_in_the_heartbeat(
    stream: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "HEARTBEAT_SECONDS", 0.02)
    recorder.device_memory = lambda: (5, 9)
    recorder.start_heartbeat(None, time.monotonic())
    eventually(lambda: [e for e in read(stream) if isinstance(e, Heartbeat) and e.device_used_bytes == 5])


@pytest.mark.parametrize("trouble", ["raises", "hangs"])
def test_a_driver_in_trouble_stops_no_heartbeat(
    stream: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(recorder_module, "HEARTBEAT_SECONDS", 0.02)
    asked, let_go = threading.Event(), threading.Event()

    def memory() -> tuple[int, int] | None:
        asked.set()
        if trouble == "raises":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        let_go.wait(30)
        return None

    recorder.device_memory = memory
    recorder.start_heartbeat(None, time.monotonic())
    assert asked.wait(10)
    count = len(read(stream))
    eventually(lambda: len(read(stream)) > count + 5)
    let_go.set()


def vitals_of(path: Path) -> list[Vitals]:
    return [event for event in read(path) if isinstance(event, Vitals)]


def test_vitals_are_in_the_stream_soon_and_again_at_their_interval(
    stream: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "VITALS_SECONDS", 0.1)
    passed: list[Vitals] = []
    recorder.on_vitals = passed.append
    recorder.start_heartbeat(None, time.monotonic())
    seen = eventually(lambda: vitals_of(stream) if len(vitals_of(stream)) >= 4 else None)
    assert seen[-1].t - seen[0].t > 0.09 * (len(seen) - 1) - 0.1
    assert seen[0].host_total_bytes is not None
    assert seen[0].disk_free_bytes is not None
    assert seen[0].cpu_percent is not None
    assert seen[0].gpu_percent is None
    eventually(lambda: len(passed) >= 4)
    assert passed[0].disk_total_bytes == seen[0].disk_total_bytes


def test_an_nvidia_smi_that_hangs_stops_no_heartbeat_and_ends_with_the_run(
    stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("engine.vitals.SMI_SECONDS", 60.0)
    monkeypatch.setattr(recorder_module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(recorder_module, "VITALS_SECONDS", 0.02)
    recorder = Recorder(stream, RUN, smoke_contract())
    recorder.machine.gpu = "0"
    recorder.start_heartbeat(None, time.monotonic())
    pid = eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    count = len(read(stream))
    eventually(lambda: len(read(stream)) > count + 5)
    assert vitals_of(stream) == []
    recorder.finish(end_event())
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert isinstance(read(stream)[-1], End)


def test_trouble_with_what_is_done_about_vitals_ends_neither_them_nor_the_run(
    stream: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "VITALS_SECONDS", 0.02)

    def raises(vitals: Vitals) -> None:
        raise OSError("no such disk")

    recorder.on_vitals = raises
    recorder.start_heartbeat(None, time.monotonic())
    eventually(lambda: len(vitals_of(stream)) >= 3)


OVERRUN = """
import sys, time
from pathlib import Path
from engine import recorder as module
from engine.recorder import Recorder
from engine.stream import Phase
from tests.streams import RUN, smoke_contract, run_event

path, trouble = Path(sys.argv[1]), sys.argv[2]
module._LOCK_SECONDS = 0.2
started = time.monotonic()
recorder = Recorder(path, RUN, smoke_contract())
recorder.enter("import")
recorder.start_heartbeat(started + 0.3, started)
recorder.emit(run_event())
recorder.enter("load-teacher")
if trouble == "lock":
    recorder._lock.acquire()
while trouble != "ends":
    time.sleep(60)
"""


def overrun(path: Path, trouble: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OVERRUN, str(path), trouble],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_a_process_that_overran_its_budget_is_ended_with_exit_code_4_and_says_where(stream: Path) -> None:
    done = overrun(stream, "hangs")
    assert done.returncode == ExitCode.TIMEOUT
    end = read(stream)[-1]
    assert isinstance(end, End)
    assert (end.status, end.exit_code) == ("TIMEOUT", ExitCode.TIMEOUT)
    assert end.reason == "the time budget ended in phase load-teacher, after 0 steps"
    assert end.seconds >= 0.3
    assert "TIMEOUT: the time budget ended in phase load-teacher" in done.stdout


def test_a_process_that_hangs_while_it_writes_is_ended_too(stream: Path) -> None:
    assert overrun(stream, "lock").returncode == ExitCode.TIMEOUT


def test_a_process_whose_disk_is_full_is_ended_too() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = overrun(Path("/dev/full"), "hangs")
    assert done.returncode == ExitCode.TIMEOUT
    assert "error: the stream could not be closed" in done.stdout


def test_a_process_that_ends_in_time_is_left_alone(stream: Path) -> None:
    assert overrun(stream, "ends").returncode == 0


def test_each_phase_knows_its_seconds(stream: Path) -> None:
    recorder = Recorder(stream, RUN, smoke_contract())
    for name in ("import", "train", "import"):
        recorder.enter(name)
        deadline = time.monotonic() + 0.02
        while time.monotonic() < deadline:
            pass
    recorder.finish(end_event())
    assert set(recorder.phase_seconds) == {"start", "import", "train"}
    assert recorder.phase_seconds["import"] >= 0.04 > recorder.phase_seconds["train"] >= 0.02


def test_human_lines_stand_in_the_words_that_people_grep_for(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(stream, RUN, smoke_contract())
    for event in smoke_events(10, max_steps=12):
        recorder.emit(event)
    recorder.finish(end_event(10))
    lines = capsys.readouterr().out.splitlines()
    assert "  Step 3/12: loss: 4.7000" in lines
    assert "[SMOKE] 10 steps in 20.00s: initial_loss=4.9000, final_loss=4.0000, throughput=0.50 step/s" in lines
    assert "[SMOKE] projected full-run wall time (50000 steps): 6.94h / 416.7 min / 25000.0s" in lines
    assert "PASS F-DISTILL-SMOKE-001: expected eval.loss falls, observed 5 to 4" in lines
    assert lines[-1] == "COMPLETED: the time budget is reached (10 steps, 40.0s)"


def test_a_full_run_ends_in_the_words_of_a_full_run() -> None:
    run = run_event(mode="train")
    first, last = human_lines(end_event(50), run)
    assert first == "✓ Distillation complete: initial_loss=4.9000 → final_loss=4.0000 (50 steps, 40.0s)"
    assert last.startswith("COMPLETED")
    assert [line[:7] for line in human_lines(end_event(50, status="STOPPED"), run)] == ["STOPPED"]
    assert "initial_loss=nan" in human_lines(end_event(summary={"final_loss": 1.0}), run)[0]


PRINTING = """
import sys
from pathlib import Path
from engine.recorder import Recorder
from tests.streams import RUN, smoke_contract, end_event, smoke_events

recorder = Recorder(Path(sys.argv[1]), RUN, smoke_contract())
for event in smoke_events(10, student="/models/caf\\udce9 \\u2713"):
    recorder.emit(event)
recorder.log("l" * 20_000)
recorder.finish(end_event())
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_output_that_cannot_show_a_character_shows_its_code(stream: Path, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTING, str(stream)],
        cwd=ROOT, capture_output=True, timeout=30, check=False, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"/models/caf\udce9" in done.stdout
    run = next(event for event in read(stream) if isinstance(event, Run))
    assert run.student == "/models/caf\\udce9 \u2713"


def test_an_output_on_a_full_disk_ends_neither_the_run_nor_its_exit_code(stream: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTING, str(stream)],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=30, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # as the supervisor starts the engine
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert isinstance(read(stream)[-1], End)


FULL = """
import json, resource, sys
from pathlib import Path
from engine.recorder import Recorder
from engine.stream import Log
from tests.streams import RUN, smoke_contract, run_event, end_event

recorder = Recorder(Path(sys.argv[1]), RUN, smoke_contract())
recorder.emit(run_event())
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, most))
for i in range(5):
    recorder.log("x" * 1_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
if sys.argv[2] == "log":
    recorder.log("room again")
recorder.finish(end_event())
"""


@pytest.mark.parametrize(("first", "told"), [("log", 1), ("end", 0)])
def test_after_a_full_disk_the_operator_is_told_once_and_never_after_the_end(
    stream: Path, first: str, told: int
) -> None:
    arguments = [sys.executable, "-c", FULL, str(stream), first]
    subprocess.run(arguments, cwd=ROOT, check=True, timeout=30, capture_output=True)
    events = read(stream)
    assert [event.seq for event in events] == list(range(len(events)))
    messages = [event.message for event in events if isinstance(event, Log) and event.level == "warning"]
    assert ["could not be written" in message for message in messages] == [True] * told
    assert isinstance(events[-1], End)


def test_what_was_left_out_of_the_stream_is_not_judged(stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(stream, RUN, smoke_contract())
    recorder.emit(run_event())
    recorder.enter("train")
    with monkeypatch.context() as full:
        full.setattr("engine.stream_writer.StreamWriter.max_backlog", 0)
        recorder.emit(Heartbeat(phase="train", step=0, rss_bytes=0))
    recorder.emit(step_event(1, 1.0))
    judge = Judge(smoke_contract())
    for event in read(stream):
        judge.observe(event)
    assert recorder.verdicts == judge.verdicts
    assert FAIL not in {v.verdict for v in recorder.verdicts}
    recorder.finish(end_event())
    assert not [e for e in read(stream) if isinstance(e, Heartbeat) and e.rss_bytes == 0]


def test_every_line_of_the_stream_is_json(stream: Path, recorder: Recorder) -> None:
    recorder.log("a\nb\u2028c\x1b[2J")
    assert [json.loads(line)["event"] for line in stream.read_text().split("\n") if line] == ["log"]
