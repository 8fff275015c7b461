"""The supervisor with real trainers: what is recorded, what is signalled, what survives whom."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dispatch_rig import Run, processes_of, until

from dispatch import supervisor

WAIT = "import os,time\nprint('ready', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT


def kill(process: Any, number: int = signal.SIGKILL) -> None:
    os.kill(process["pid"], number)


@pytest.mark.parametrize("code", [0, 3])
def test_the_trainers_exit_code_is_recorded(run: Run, code: int) -> None:
    answer = run.start(f"import sys; print('out'); print('err', file=sys.stderr); sys.exit({code})")
    record = run.exit()
    assert answer["result"] == "started"
    assert (record["run"], record["exit_code"], record["signal"], record["orphans"]) == (run.run, code, None, [])
    assert {"out", "err"} <= set(run.log().split())
    assert run.status()["state"] == "ended"
    assert [line["event"] for line in run.lines()] == ["starting", "started", "exited"]


def test_a_trainer_killed_by_a_signal_is_recorded_as_such(run: Run) -> None:
    run.start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    record = run.exit()
    assert (record["exit_code"], record["signal"]) == (None, signal.SIGKILL)


def test_a_trainer_that_cannot_be_started_is_told_in_one_line(run: Run) -> None:
    done = run.call("run", "--", "/no/such/python", "-m", "engine")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "/no/such/python: No such file" in done.stderr
    assert "/no/such/python" in str(run.exit()["error"])


@pytest.mark.parametrize("command", ["run", "status", "stop"])
def test_a_directory_without_a_manifest_is_refused(tmp_path: Path, run: Run, command: str) -> None:
    (run.path / "dispatch.json").unlink()
    done = run.call(command)
    assert done.returncode == 1
    assert "not a run directory" in done.stderr
    assert not (run.path / ".lock").exists()


def test_a_run_that_was_never_started_cannot_be_stopped(run: Run) -> None:
    assert run.status()["state"] == "starting"
    done = run.call("stop")
    assert done.returncode == 1
    assert "never started" in done.stderr


def test_a_caller_without_standard_descriptors_starts_a_run_like_any_other(run: Run) -> None:
    command = shlex.join(run.argv("run", *run.trainer("print('here')")))
    subprocess.run(["sh", "-c", f"exec {command} <&- >&- 2>&-"], timeout=60, check=False)
    assert run.exit()["exit_code"] == 0
    assert run.log() == "here\n"


def test_signals_that_the_caller_ignores_still_reach_the_trainer(run: Run) -> None:
    script = "import signal; print(*(signal.getsignal(n) == signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGQUIT)))"
    command = shlex.join(run.argv("run", *run.trainer(script)))
    subprocess.run(["sh", "-c", f"trap '' TERM QUIT INT; exec {command}"], timeout=60, check=True, capture_output=True)
    run.exit()
    assert run.log().split() == ["True", "True"]


def test_the_trainer_gets_an_allowlisted_environment_and_a_private_umask(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    monkeypatch.setenv("KDCONSOLE_TRAIN__STEPS", "5")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}{os.pathsep}{os.pathsep}some/where")
    run.start(
        "import os, json, signal, sys\nopen('made', 'w').close()\n"
        "print(json.dumps([dict(os.environ), os.getcwd(), sys.stdin.read(), os.stat('made').st_mode & 0o777,"
        " signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, os.getpgid(0) == os.getpid(),"
        " sorted(map(int, os.listdir('/proc/self/fd')))]))"
    )
    run.exit()
    environment, directory, given, mode, deaf_to_hangup, leads, descriptors = json.loads(run.log())
    assert (directory, given, mode, deaf_to_hangup, leads) == (str(run.path), "", 0o600, True, True)
    assert not {"SECRET_TOKEN", "KDCONSOLE_TRAIN__STEPS", "TOKENIZERS_PARALLELISM"} & environment.keys()
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == environment["PYTHONFAULTHANDLER"] == "1"
    _, *rest = environment["PYTHONPATH"].split(os.pathsep)
    assert rest == [os.path.abspath("some/where")]
    assert len(descriptors) == 5, "standard input, output and error, the lock, and the listing itself"
    files = {path.name: path.stat().st_mode & 0o777 for path in run.path.iterdir() if path.name != "dispatch.json"}
    assert set(files.values()) == {0o600}


def test_orphans_are_named_and_ended_whether_they_heed_sigterm_or_not(run: Run) -> None:
    run.start(
        "import os, signal, subprocess, sys, time\n"
        "tame = subprocess.Popen(['sleep', '60'])\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        print('wild', os.getpid(), flush=True)\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "while not os.path.getsize('launch.log'): time.sleep(0.01)\n"
        "print('tame', tame.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    record: Any = run.exit()
    words = run.log().split()
    left = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    ended = {orphan["pid"]: orphan["signal"] for orphan in record["orphans"]}
    assert ended == {left["tame"]: signal.SIGTERM, left["wild"]: signal.SIGKILL}
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ended)
    assert record["exit_code"] == 0
    assert sum(line["event"] == "orphans" for line in run.lines()) == 2


def test_helpers_that_end_by_themselves_are_no_orphans(run: Run) -> None:
    run.start("import subprocess; subprocess.Popen(['sleep', '0.05'])")
    assert run.exit()["orphans"] == []


@pytest.mark.parametrize("end", ["killed", "interrupted from the keyboard"])
def test_the_run_outlives_the_console_and_its_terminal(run: Run, end: str) -> None:
    # The caller leads a session with a terminal of its own, starts the run, and both are then taken away.
    caller = f"import subprocess, time; subprocess.run({run.argv('run', *run.trainer(WAIT))!r}); time.sleep(600)"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-I", "-c", caller])
    run.said("ready")
    until(lambda: run.status()["state"] == "running", "the run to be on record")
    if end == "killed":
        os.kill(pid, signal.SIGKILL)
    else:
        os.write(terminal, b"\x03")
    os.waitpid(pid, 0)
    os.close(terminal)
    state = run.status()
    assert (state["state"], state["unsupervised"]) == ("running", False)
    (run.path / "go").touch()
    assert run.exit()["exit_code"] == 0


def test_launches_that_race_start_one_trainer(run: Run) -> None:
    script = "open('starts', 'a').write('x')\n" + WAIT
    racers = [
        subprocess.Popen(run.argv("run", *run.trainer(script)), stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    answers = [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
    run.said("ready")
    assert sorted(answer["result"] for answer in answers) == ["already_running"] * 3 + ["started"]
    assert len({answer["trainer"]["pid"] for answer in answers}) == 1
    (run.path / "go").touch()
    run.exit()
    assert run.start(script)["result"] == "already_ended"
    assert (run.path / "starts").read_text() == "x"


def test_a_trainer_whose_supervisor_was_killed_runs_on_unsupervised_and_can_be_stopped(run: Run) -> None:
    answer = run.start(WAIT)
    run.said("ready")
    kill(answer["supervisor"])
    until(lambda: run.status()["unsupervised"], "the supervisor's death to be seen")
    assert run.status()["state"] == "running"
    assert run.start(WAIT)["result"] == "already_running"
    stopped = run.stop()
    assert (stopped["result"], stopped["state"], stopped["exit"]) == ("stopped", "lost", None)


def test_a_run_whose_processes_are_gone_without_a_record_is_lost(run: Run) -> None:
    answer = run.start(WAIT)
    kill(answer["supervisor"])
    kill(answer["trainer"])
    until(lambda: run.status()["state"] == "lost", "the run to be lost")
    done = run.call("run", *run.trainer(WAIT))
    assert done.returncode == 1
    assert "without an exit record" in done.stderr


@pytest.mark.parametrize("change", [{"start_ticks": 7}, {"boot_id": "another boot"}])
def test_a_process_that_only_shares_the_pid_is_neither_believed_nor_signalled(
    run: Run, change: dict[str, object]
) -> None:
    innocent = subprocess.Popen(["sleep", "60"])
    try:
        same = supervisor.identify(innocent.pid, run.run)
        assert supervisor.alive(same)
        other: Any = {**same, **change}
        supervisor.note(run.path, "started", run=run.run, supervisor=other, trainer=other, session=1)
        assert run.status()["state"] == "lost"
        assert run.stop("--grace", "0", "--kill")["result"] == "already_ended"
        assert not supervisor.send_signal(other, signal.SIGKILL)
        assert innocent.poll() is None
        assert supervisor.send_signal(same, signal.SIGTERM)
        assert innocent.wait(10) == -signal.SIGTERM
        assert not supervisor.send_signal(same, signal.SIGTERM)
    finally:
        innocent.kill()
        innocent.wait()


def test_stop_asks_the_leader_alone_and_is_confirmed_by_the_exit(run: Run) -> None:
    run.start(
        "import signal, subprocess, sys\n"
        "helper = subprocess.Popen(['sleep', '60'])\n"
        "def stop(*_):\n"
        "    print('helper', helper.poll(), flush=True)\n"
        "    helper.kill(); helper.wait(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n" + WAIT
    )
    run.said("ready")
    stopped: Any = run.stop("--grace", "20")
    assert (stopped["rc"], stopped["result"], stopped["killed"]) == (0, "stopped", False)
    assert stopped["exit"]["exit_code"] == 130
    assert "helper None" in run.log(), "the helper lived when the leader was asked"
    assert run.stop()["result"] == "already_ended"
    assert [line["by"] for line in run.lines() if line["event"] == "signal"] == ["stop"]


def test_a_trainer_deaf_to_sigterm_is_still_running_until_it_is_killed_with_its_group(run: Run) -> None:
    run.start("import subprocess\nsubprocess.Popen(['sleep', '60'])\n" + DEAF)
    run.said("ready")
    first = run.stop("--grace", "0.2")
    assert (first["rc"], first["result"], first["state"]) == (4, "still_running", "running")
    second: Any = run.stop("--grace", "0.2", "--kill")
    assert (second["rc"], second["result"], second["killed"]) == (0, "stopped", True)
    assert second["exit"]["signal"] == signal.SIGKILL
    assert second["exit"]["orphans"] == [], "the group was killed as a whole"


def test_a_stop_that_is_asked_again_sends_no_second_signal_unless_it_is_to_be_at_once(run: Run) -> None:
    run.start("import signal\nsignal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n" + WAIT)
    run.said("ready")
    for _ in range(3):  # as after a lost connection
        assert run.stop("--grace", "0.2")["result"] == "still_running"
    assert run.log().split() == ["ready", "asked"]
    run.stop("--grace", "0")
    (run.path / "go").touch()
    run.exit()
    assert run.log().split() == ["ready", "asked", "asked"]


@pytest.mark.parametrize(("first", "wrote"), [("", False), ("open('events.jsonl', 'a').write('x')\n", True)])
def test_the_exit_record_says_whether_the_attempt_wrote_to_the_stream(run: Run, first: str, wrote: bool) -> None:
    (run.path / "events.jsonl").write_text("of an earlier attempt\n")
    run.start(first)
    assert run.exit()["wrote"] is wrote


def test_the_supervisor_passes_sigterm_on_once_and_ignores_sighup(run: Run) -> None:
    answer = run.start("import signal\nsignal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n" + WAIT)
    run.said("ready")
    kill(answer["supervisor"], signal.SIGHUP)
    kill(answer["supervisor"], signal.SIGTERM)
    run.said("asked")
    kill(answer["supervisor"], signal.SIGTERM)
    kill(answer["supervisor"], signal.SIGINT)
    (run.path / "go").touch()
    assert run.exit()["exit_code"] == 0
    assert run.log().split() == ["ready", "asked"]


def test_a_torn_line_of_supervisor_jsonl_takes_no_other_with_it(run: Run) -> None:
    (run.path / "supervisor.jsonl").write_bytes(b'{"v":1,"event":"star')
    run.start("pass")
    run.exit()
    whole = (run.path / "supervisor.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["event"] for line in whole] == ["starting", "started", "exited"]
    assert run.status()["trainer"] is not None


def test_a_symlink_is_not_followed_for_any_file_of_the_supervisor(run: Run, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run.path / "launch.log").symlink_to(victim)
    done = run.call("run", *run.trainer("print('overwritten')"))
    assert done.returncode == 1
    assert victim.read_text() == "mine"


STATE_FILES = ("dispatch.json", "exit.json", "supervisor.jsonl")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", ["status", "stop", "run"])
@pytest.mark.parametrize("name", STATE_FILES)
def test_a_pipe_in_place_of_a_state_file_keeps_nobody_waiting(run: Run, name: str, command: str) -> None:
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    done = run.call(command, *(run.trainer("") if command == "run" else ()))
    if name == "exit.json" and command == "run":  # it is no record of an end, and is replaced by one
        assert done.returncode == 0, done.stderr
        until((run.path / name).is_file, "the exit record")
    elif name == "exit.json" and command == "status":
        assert json.loads(done.stdout)["state"] == "starting"
    else:
        assert done.returncode == 1
        wanted = {"dispatch.json": "not a run directory", "supervisor.jsonl": "not a regular file"}
        assert wanted.get(name, "never started") in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [".lock", "launch.log"])
def test_a_pipe_in_place_of_a_file_to_write_is_refused_at_once(run: Run, name: str) -> None:
    os.mkfifo(run.path / name)
    done = run.call("run", *run.trainer(""))
    assert done.returncode == 1
    assert "not a regular file" in done.stderr or "No such device or address" in done.stderr


def test_an_atomic_write_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".exit.json.tmp")
    with pytest.raises(OSError, match="No such device or address"):
        supervisor.write_atomic(tmp_path / "exit.json", b"{}")
    reader = os.open(tmp_path / ".exit.json.tmp", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="not a regular file"):
            supervisor.write_atomic(tmp_path / "exit.json", b"{}")
    finally:
        os.close(reader)


def test_a_running_trainer_can_be_stopped_whatever_its_exit_record_was_replaced_by(run: Run) -> None:
    run.start(WAIT)
    run.said("ready")
    os.mkfifo(run.path / "exit.json")
    assert run.status()["state"] == "running"
    assert run.stop()["result"] == "stopped"
    assert run.exit()["signal"] == signal.SIGTERM


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 200_000, '{"a": ' * 200_000, "\x00"])
def test_an_exit_record_that_is_none_is_passed_over(run: Run, text: str) -> None:
    (run.path / "exit.json").write_text(text)
    assert supervisor.status(run.path)["state"] == "starting"


def test_a_file_that_is_too_large_to_be_a_record_is_not_read(run: Run) -> None:
    for name in ("exit.json", "supervisor.jsonl"):
        (run.path / name).touch()
        os.truncate(run.path / name, 1 << 40)
        if name == "exit.json":
            assert supervisor.status(run.path)["state"] == "starting"
            continue
        with pytest.raises(OSError, match=r"more than 16,777,216 bytes"):
            supervisor.status(run.path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", ["status", "stop", "run"])
@pytest.mark.parametrize(
    "fields",
    [
        '"supervisor": 7',
        '"trainer": [], "session": 1',
        '"supervisor": {"pid": "7", "start_ticks": 1}',
        '"trainer": {"pid": -1, "start_ticks": 1}',
        '"trainer": {"pid": 99999999999, "start_ticks": 1}',
        '"trainer": {"pid": true, "start_ticks": 1}',
        '"trainer": {"pid": 7, "start_ticks": null}',
        '"trainer": null, "session": "x"',
    ],
)
def test_a_start_on_record_that_names_no_process_is_neither_believed_nor_repeated(
    run: Run, fields: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "supervisor.jsonl").write_text(f'{{"event": "started", {fields}}}\n')
    assert supervisor.main([command, str(run.path)]) == 1
    assert "supervisor.jsonl: names no process where it records a start" in capsys.readouterr().err


def test_a_line_that_is_nested_too_deeply_is_passed_over(run: Run) -> None:
    (run.path / "supervisor.jsonl").write_text("[" * 200_000 + "\n")
    assert supervisor.status(run.path)["state"] == "starting"


def test_the_trainers_log_is_an_ordinary_blocking_file(run: Run) -> None:
    run.start("import os; print(os.get_blocking(1), os.get_blocking(2))")
    run.exit()
    assert run.log() == "True True\n"


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs the ps command")
def test_without_proc_the_process_table_of_ps_tells_the_same() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        [told] = supervisor._ps("-p", str(child.pid))
        known = supervisor.read_process(child.pid)
        assert known is not None
        assert (told.pid, told.parent, told.group, told.name) == (known.pid, known.parent, known.group, known.name)
        assert child.pid in {row.pid for row in supervisor._ps("-A")}
        assert supervisor._ps("-p", str(child.pid))[0].start_ticks == told.start_ticks
    finally:
        child.kill()
        child.wait()


def test_processes_of_a_directory_are_found(tmp_path: Path) -> None:
    # The check that every test here ends with can fail.
    child = subprocess.Popen(["sleep", "60"], cwd=tmp_path)
    until(lambda: processes_of(tmp_path) == [child.pid], "the process to be seen")
    child.kill()
    child.wait()
