"""The supervisor watches what its trainer does: a stall is noticed, told, and ended only where that was asked for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dispatch_rig import Run, until

from dispatch import runs, supervisor
from dispatch.manifest import RunStatus, decode
from engine.config import load_config
from engine.falsifiers import builtin_contract

TRAINER = """
import faulthandler, json, os, signal, threading, time
run, seq, lock = json.load(open('dispatch.json'))['run'], 0, threading.Lock()
def emit(event, **fields):
    global seq
    with lock:
        stamp = (1e9, 3e9, 0.0)[seq % 3]  # a clock that jumps by decades
        with open('events.jsonl', 'a') as file:
            file.write(json.dumps(dict(event=event, v=1, run=run, seq=seq, t=stamp, **fields), separators=(',', ':')))
            file.write(chr(10))
        seq += 1
def beat():
    while True:
        emit('heartbeat', phase='train', step=1)
        time.sleep(0.02)
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
threading.Thread(target=beat, daemon=True).start()
"""
STACKS = "faulthandler.register(signal.SIGUSR1, all_threads=True)\n"
HANGS = (
    TRAINER + STACKS + "emit('phase', name='train')\nwait_for('go')\nemit('step', step=1, seconds=0.1)\nwait_for('end')"
)


def status(run: Run) -> RunStatus:
    return decode(RunStatus, json.dumps(run.status()).encode(), "status")


@contextlib.contextmanager
def suspended(*pids: int) -> Iterator[None]:
    """While inside, these processes get no time."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def pid_of(answer: dict[str, Any], who: str = "trainer") -> int:
    pid: int = answer[who]["pid"]
    return pid


def test_a_trainer_that_hangs_is_noticed_although_its_heartbeat_goes_on(run: Run) -> None:
    run.supervise(stall_seconds=0.5)
    run.start(HANGS)
    until(lambda: run.lines("stall"), "the stall")
    [stall] = run.lines("stall")
    assert (stall["phase"], stall["allowed_seconds"], stall["stacks"]) == ("train", 0.5, True)
    assert stall["seconds"] >= 0.5
    assert time.time() - 60 < stall["since"] < stall["t"]
    run.said("in wait_for")
    assert 'File "<string>"' in run.log(), "every thread's stack, as faulthandler writes it"
    until(lambda: status(run).heartbeat.stall is not None, "the stall in the status")  # type: ignore[union-attr]
    assert status(run).state == "running", "nobody asked for it to be killed"

    (run.path / "go").touch()
    until(lambda: run.lines("recovered"), "the recovery")
    [recovered] = run.lines("recovered")
    assert recovered["stall"]["phase"] == "train"
    until(lambda: status(run).heartbeat.stall is None, "the status to know of it")  # type: ignore[union-attr]
    until(lambda: len(run.lines("stall")) == 2, "the second stall")
    (run.path / "end").touch()
    record = run.exit()
    assert (record["exit_code"], record["stall"]) == (0, None)


def test_a_suspended_trainer_is_a_stall_and_says_where_it_was_when_it_goes_on(run: Run) -> None:
    run.supervise(stall_seconds=0.5)
    answer = run.start(TRAINER + STACKS + "def training():\n wait_for('end')\nemit('phase', name='train')\ntraining()")
    until((run.path / "events.jsonl").exists, "the first phase")
    with suspended(pid_of(answer)):
        until(lambda: run.lines("stall"), "the stall")
        assert run.lines("stall")[0]["process"] == "T"
        assert "training" not in run.log()
    run.said("in training")
    (run.path / "end").touch()
    assert run.exit()["exit_code"] == 0


def test_the_real_engine_says_where_it_hangs(run: Run) -> None:
    """Suspended while it loads torch, which is before any thread but ours can tell of it."""
    run.supervise(stall_seconds=0.3)
    config = load_config(None, template="builtin", sets=["train.device=cpu", "smoke.budget_seconds=60"])
    made = runs.create_run(config, evidence=run.path, contract_text=builtin_contract("smoke"))
    for name in ("config.yaml", "contract.yaml"):
        (made.path / name).rename(run.path / name)
    done = run.call("run", "--", sys.executable, "-P", "-m", "engine", str(run.path))
    assert done.returncode == 0, done.stderr
    stream = run.path / "events.jsonl"
    until(lambda: stream.exists() and b'"phase"' in stream.read_bytes(), "its first phase")
    with suspended(pid_of(json.loads(done.stdout))):
        until(lambda: [line for line in run.lines("stall") if line["process"] == "T"], "the stall", 60.0)
    run.said("(most recent call first)")
    run.said("engine/__main__.py")  # the main thread comes last
    stopped = run.stop("--grace", "30")
    assert stopped["result"] == "stopped"


@pytest.mark.parametrize("allowed", [0.3, None])
def test_a_phase_has_its_own_budget_and_the_first_step_has_one_too(run: Run, allowed: float | None) -> None:
    run.supervise(stall_seconds=600 if allowed else 0.3)
    # The budget of a phase that is over counts no more; no step was made, so the first one is what is waited for.
    run.start(
        TRAINER + STACKS + "emit('phase', name='load-data', budget_seconds=0.001)\n"
        f"emit('phase', name='train', budget_seconds={allowed})\nwait_for('end')"
    )
    until(lambda: run.lines("stall"), "the stall")
    [stall] = run.lines("stall")
    assert (stall["phase"], stall["allowed_seconds"]) == ("train", 0.3)
    (run.path / "end").touch()
    run.exit()


def test_steps_that_take_long_may_take_long_but_the_first_tells_nothing_of_the_others(tmp_path: Path) -> None:
    watch, stream = watching(tmp_path, stall_seconds=600.0)
    stream.write_bytes(line("phase", name="train"))
    watch.look()
    assert watch._allowed() == 600.0
    append(stream, line("step", step=1, seconds=300.0))  # it compiled
    watch.look()
    assert watch._allowed() == 600.0
    append(stream, line("step", step=2, seconds=60.0))
    watch.look()
    assert watch._allowed() == supervisor.STALL_FACTOR * 60.0
    append(stream, line("phase", name="export", budget_seconds=1800.0))
    watch.look()
    assert watch._allowed() == 1800.0


def watching(directory: Path, **rules: float) -> tuple[supervisor.Watch, Path]:
    """A watch over a stream that this test writes; the process is this one, which nothing is sent to."""
    order = supervisor.Order(directory, "r", [], {}, (), None, rules.get("stall_seconds", 600.0), None)
    stream = directory / "events.jsonl"
    written = stream.stat().st_size if stream.exists() else 0
    return supervisor.Watch(order, supervisor.identify(os.getpid(), "r"), written), stream


def line(event: str, **fields: object) -> bytes:
    return json.dumps({"event": event, "v": 1, "run": "r", **fields}).encode() + b"\n"


def append(stream: Path, data: bytes) -> None:
    with stream.open("ab") as file:
        file.write(data)


def test_the_stream_is_understood_however_it_is_cut_and_whatever_stands_in_it(tmp_path: Path) -> None:
    stream = tmp_path / "events.jsonl"
    stream.write_bytes(line("phase", name="of an earlier attempt", budget_seconds=0.0001))
    watch, _ = watching(tmp_path)
    whole = line("phase", name="load-data", budget_seconds=5.0) + b'{"event":"phase", torn\n' + b"\xff\xfe\n" * 3
    whole += line("log", message='"event":"phase","name":"forged"') + line("phase", name="train") + b"[1]\n"
    whole += line("step", step=1, seconds=0.5) + line("step", step=2, seconds="NaN") + line("step", step=3, seconds=7.0)
    seen = []
    for begin in range(0, len(whole), 7):
        append(stream, whole[begin : begin + 7])
        watch.look()
        if watch._phase not in seen:
            seen.append(watch._phase)
    assert seen == ["start", "load-data", "train"]
    assert (watch._steps, watch._step_seconds) == (2, 7.0)
    stream.write_bytes(whole[:200])  # a torn tail is cut back, and what follows is read all the same
    watch.look()
    append(stream, b"\n" + line("phase", name="resume"))
    watch.look()
    assert watch._phase == "resume"
    stream.unlink()
    watch.look()


def test_only_what_was_watched_counts(run: Run) -> None:
    """A host that sleeps, or a supervisor that gets no time, makes no stall of it."""
    run.supervise(stall_seconds=2.0)
    answer = run.start(
        TRAINER + "emit('phase', name='train')\n"
        "while not os.path.exists('end'):\n time.sleep(0.01)\n emit('step', step=1, seconds=0.01)"
    )
    until((run.path / "events.jsonl").exists, "the first phase")
    with suspended(pid_of(answer)):
        with suspended(pid_of(answer, "supervisor")):
            time.sleep(2.4)
        beats = status(run).heartbeat
        assert beats is not None
        until(lambda: status(run).heartbeat.beat > beats.beat + 1, "two looks")  # type: ignore[union-attr]
    (run.path / "end").touch()
    run.exit()
    assert not run.lines("stall")


def test_a_stall_is_ended_only_if_configured_and_the_record_says_so(run: Run) -> None:
    run.supervise(stall_seconds=0.3, kill_after_stall_seconds=0.3)
    run.start("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANGS)
    record = decode_exit(run)
    assert (record["signal"], record["stall"]["phase"]) == (signal.SIGKILL, "train")
    assert record["stall"]["seconds"] >= 0.6
    assert [(each["signal"], each["by"]) for each in run.lines("signal")] == [(15, "stall"), (9, "stall")]
    told = status(run).exit
    assert told is not None
    assert told.describe() == "killed by SIGKILL, ended by its supervisor after 1 s without progress"


def decode_exit(run: Run) -> dict[str, Any]:
    record: dict[str, Any] = run.exit()
    return record


def test_a_trainer_that_has_no_handler_yet_is_not_ended_by_being_asked_where_it_is(run: Run) -> None:
    run.supervise(stall_seconds=0.2)
    run.start(TRAINER + "wait_for('end')")
    until(lambda: run.lines("stall"), "the stall")
    [stall] = run.lines("stall")
    assert (stall["phase"], stall["stacks"]) == ("start", False)
    (run.path / "end").touch()
    assert run.exit()["exit_code"] == 0


def test_a_stop_that_must_kill_has_the_stacks_written_first(run: Run) -> None:
    run.start("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANGS)
    until((run.path / "events.jsonl").exists, "the first phase")
    stopped = run.stop("--grace", "0.2", "--kill")
    assert (stopped["result"], stopped["killed"]) == ("stopped", True)
    assert "in wait_for" in run.log()


def test_the_supervisors_own_heartbeat_tells_since_when_it_is_gone(run: Run) -> None:
    answer = run.start(HANGS)
    until(lambda: status(run).heartbeat is not None, "the first heartbeat")
    size = (run.path / supervisor.HEARTBEAT).stat().st_size
    until(lambda: status(run).heartbeat.beat > 3, "more of them")  # type: ignore[union-attr]
    first = status(run).heartbeat
    assert first is not None
    assert first.run == run.run
    assert first.seconds is not None
    assert first.seconds < 20
    assert (run.path / supervisor.HEARTBEAT).stat().st_size == size, "it does not grow"
    if sys.platform == "linux":
        assert first.rss_bytes is not None
        assert first.rss_bytes > 1 << 20
        assert first.cpu_seconds is not None
    os.kill(pid_of(answer, "supervisor"), signal.SIGKILL)
    until(lambda: status(run).unsupervised, "the death of the supervisor")
    before = status(run).heartbeat
    until(lambda: status(run).heartbeat.seconds > before.seconds, "its age to grow")  # type: ignore[union-attr,operator]
    assert status(run).heartbeat.beat == before.beat  # type: ignore[union-attr]
    run.stop("--grace", "0.1", "--kill")


def test_the_heartbeat_is_gone_with_the_run_and_a_full_record_is_the_last_thing_written(run: Run) -> None:
    run.start("pass")
    run.exit()
    assert not (run.path / supervisor.HEARTBEAT).exists()
    assert status(run).heartbeat is None


def test_a_run_that_the_host_lost_with_its_last_boot_is_lost_and_says_why(run: Run) -> None:
    before = {**supervisor.identify(os.getpid(), run.run), "boot_id": "another boot"}
    supervisor.note(run.path, "started", run=run.run, supervisor=before, trainer=before, session=1)
    told = status(run)
    assert (told.state, told.rebooted) == ("lost", True)
    assert run.stop()["result"] == "already_ended"
    same = dict(supervisor.identify(os.getpid(), run.run), start_ticks=1)
    supervisor.note(run.path, "started", run=run.run, supervisor=same, trainer=same, session=1)
    told = status(run)
    assert (told.state, told.rebooted) == ("lost", False)
