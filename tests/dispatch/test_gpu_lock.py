"""One run a GPU: the second is refused by name, until the last process of the first is gone. A run may have several."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from dispatch_rig import Run, until

from dispatch.manifest import decode
from dispatch.places import Place
from dispatch.runs import Stop
from dispatch.supervisor import LOCK_DIRECTORIES, Refused, lock_gpu, lock_gpus, read_start
from dispatch.transport import LocalTransport

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
SHOW = "import os; print('devices', os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)"


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two GPUs of this test's own: nvidia-smi as it answers on a host that has them."""
    uuids = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    rows = "".join(f"{index}, {name}\\n" for index, name in enumerate(uuids))
    apps = tmp_path / "apps"
    apps.write_text("")
    program.write_text(f"#!/bin/sh\ncase $1 in *compute-apps*) cat {apps};; *) printf '{rows}';; esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return uuids


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Run]:
    return lambda name: Run(tmp_path / name)


def lock_file(device: str) -> Path:
    return Path(LOCK_DIRECTORIES[0] if os.access(LOCK_DIRECTORIES[0], os.W_OK) else "/tmp", f"kdconsole-{device}.lock")


def start(run: Run, script: str, *options: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    argv = run.argv("run", "--gpu", *options, *run.trainer(script))
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_run_on_a_busy_gpu_is_refused_with_the_name_of_the_first(
    gpus: list[str], make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make("first"), make("second")
    assert start(first, SLEEP).returncode == 0
    first.said("up")
    refused = start(second, SLEEP)
    assert refused.returncode == 1
    assert f"GPU {gpus[0]} is busy: run first ({first.run}) of uid {os.getuid()} has it" in refused.stderr
    assert "Traceback" not in refused.stderr
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert start(second, SHOW).returncode == 0, "the other GPU is free"
    assert second.exit()["exit_code"] == 0
    second.said(f"devices {gpus[1]}")
    first.stop("--grace", "10")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    third = make("third")
    assert start(third, SHOW).returncode == 0
    third.said(f"devices {gpus[0]}")
    third.exit()
    for each in gpus:
        lock_file(each).unlink()


def test_the_lock_outlives_supervisor_and_trainer_while_a_child_of_theirs_lives(
    gpus: list[str], make: Callable[[str], Run]
) -> None:
    # A child that left the group and the session, as a data loader's daemon may.
    script = (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n"
        " open('child', 'w').write(str(os.getpid()))\n time.sleep(600)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    first, second = make("first"), make("second")
    assert start(first, script).returncode == 0
    until((first.path / "child").exists, "the child")
    first.said("up")
    told = first.status()
    for owner in ("supervisor", "trainer"):
        identity = told[owner]
        assert isinstance(identity, dict)
        os.kill(identity["pid"], 9)
    until(lambda: first.status()["state"] == "lost", "both gone")
    refused = start(second, SLEEP)
    assert (refused.returncode, "is busy: run first" in refused.stderr) == (1, True), refused.stderr
    os.kill(int((first.path / "child").read_text()), 9)
    until(lambda: start(second, SHOW).returncode == 0, "the GPU is free once the last process is gone")
    second.exit()
    lock_file(gpus[0]).unlink()


def stopped(run: Run, tune: str = "") -> Stop:
    """What a stop says, the waits for the GPU's driver shortened."""
    run.tune = f"supervisor.FREE_SECONDS = 0.3\n{tune}"
    return decode(Stop, json.dumps(run.stop("--grace", "10")).encode(), "supervisor")


def up(run: Run) -> int:
    """Starts it with a GPU; its trainer's pid."""
    assert start(run, SLEEP).returncode == 0
    run.said("up")
    pid = run.status()["trainer"]
    assert isinstance(pid, dict)
    return int(pid["pid"])


def test_a_stop_says_that_the_gpu_is_free_after_it_was_seen_to_be(gpus: list[str], make: Callable[[str], Run]) -> None:
    first, second = make("first"), make("second")
    up(first)
    told = stopped(first)
    assert (told.result, told.gpu, told.gpu_free, told.gpu_problem) == ("stopped", gpus[0], True, "")
    assert told.cancelled
    assert told.describe() == "CANCELLED: killed by SIGTERM; the GPU is free"
    up(second)
    again = stopped(first)
    assert (again.result, again.gpu_free) == ("already_ended", True), "that a later run has it is nothing against it"
    assert stopped(second).cancelled
    lock_file(gpus[0]).unlink()


def test_a_run_that_nvidia_smi_still_lists_has_not_let_go(
    tmp_path: Path, gpus: list[str], make: Callable[[str], Run]
) -> None:
    run = make("run")
    pid = up(run)
    (tmp_path / "apps").write_text(f"1\n{pid}\n")
    told = stopped(run)
    assert (told.state, told.gpu_free, told.cancelled) == ("ended", False, False)
    assert told.describe() == (
        f"stopped: killed by SIGTERM; the GPU is NOT free: nvidia-smi still lists process {pid} of the run on it"
    )
    (tmp_path / "apps").write_text("1\n")
    assert stopped(run).describe() == "had ended already: killed by SIGTERM; the GPU is free"
    lock_file(gpus[0]).unlink()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("exec sleep 60", "nvidia-smi has not answered for 0 s: the GPU's driver hangs"),
        ("exit 9", "nvidia-smi does not tell which processes use it"),
        ("echo '[N/A]'", "nvidia-smi does not tell which processes use it"),
    ],
)
def test_where_nvidia_smi_hangs_or_fails_it_is_unknown_whether_the_gpu_is_free(
    tmp_path: Path, gpus: list[str], make: Callable[[str], Run], answer: str, problem: str
) -> None:
    run = make("run")
    up(run)
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    told = stopped(run, "supervisor.SMI_SECONDS = 0.4" if "sleep" in answer else "")
    assert (told.state, told.gpu_free, told.gpu_problem) == ("ended", None, problem)
    assert not told.cancelled
    assert "whether the GPU is free is unknown: nvidia-smi" in told.describe()
    lock_file(gpus[0]).unlink()


def test_a_process_of_the_run_that_holds_the_lock_holds_the_gpu(gpus: list[str], make: Callable[[str], Run]) -> None:
    run = make("run")
    # It left the group, and its supervisor is killed before it could end it.
    script = (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n open('child', 'w').write(str(os.getpid()))\n"
        " time.sleep(600)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    assert start(run, script).returncode == 0
    run.said("up")
    until(lambda: (run.path / "child").exists() and (run.path / "child").read_text(), "the child")
    supervisor = run.status()["supervisor"]
    assert isinstance(supervisor, dict)
    os.kill(supervisor["pid"], 9)
    told = stopped(run)
    assert (told.state, told.gpu_free) == ("lost", False)
    assert not told.cancelled
    assert told.gpu_problem == "a process of the run still holds the lock"
    os.kill(int((run.path / "child").read_text()), 9)
    until(lambda: stopped(run).gpu_free, "the lock to be let go")
    assert not stopped(run).cancelled, "how it ended was not recorded"
    lock_file(gpus[0]).unlink()


def test_a_look_whether_the_gpu_is_free_keeps_nobody_from_having_it(
    gpus: list[str], make: Callable[[str], Run]
) -> None:
    run = make("run")
    run.tune = "supervisor.LOCK_SECONDS = 30.0"
    with open(lock_file(gpus[0]), "w+") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        threading.Timer(1.0, fcntl.flock, (held, fcntl.LOCK_UN)).start()
        assert start(run, SHOW).returncode == 0
    run.exit()
    lock_file(gpus[0]).unlink()


def test_a_run_without_a_gpu_has_none_to_let_go(run: Run) -> None:
    run.start(SLEEP)
    run.said("up")
    told = stopped(run)
    assert (told.gpu, told.gpu_free, told.cancelled) == (None, None, True)
    assert told.describe() == "CANCELLED: killed by SIGTERM"


def test_without_a_gpu_there_is_nothing_to_lock(
    tmp_path: Path, make: Callable[[str], Run], gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = make("hidden")
    assert start(run, SHOW).returncode == 0
    run.exit()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    run = make("broken")
    assert start(run, SHOW).returncode == 0
    run.exit()
    assert not any(lock_file(each).exists() for each in gpus)


def test_a_device_that_is_not_there_is_refused(
    gpus: list[str], make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    refused = start(make("run"), SHOW)
    assert refused.returncode == 1
    assert "CUDA_VISIBLE_DEVICES=7: nvidia-smi knows 0, 1" in refused.stderr


def test_a_link_in_the_place_of_the_lock_is_not_followed(
    tmp_path: Path, gpus: list[str], make: Callable[[str], Run]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock_file(gpus[0]).symlink_to(victim)
    try:
        refused = start(make("run"), SHOW)
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
        assert victim.read_text() == "precious"
    finally:
        lock_file(gpus[0]).unlink()


# Several


def test_a_run_has_all_of_its_gpus_to_itself(
    gpus: list[str], make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (make(name) for name in ("first", "second", "third"))
    script = SLEEP.replace("'up'", "'up', __import__('os').environ['CUDA_VISIBLE_DEVICES']")
    assert start(first, script, "--devices", "2").returncode == 0
    first.said(f"up {gpus[0]},{gpus[1]}")
    for index, name in enumerate(gpus):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(index))
        refused = start(second, SHOW)
        assert refused.returncode == 1
        assert f"GPU {name} is busy: run first ({first.run}) of uid {os.getuid()} has it" in refused.stderr
    told = stopped(first)
    assert (told.gpu, told.gpu_free) == (f"{gpus[0]},{gpus[1]}", True)
    assert told.describe() == "CANCELLED: killed by SIGTERM; the GPUs are free"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"1,{gpus[0]},7")
    assert start(third, SHOW, "--devices", "2").returncode == 0, "of three that are named the first two, in that order"
    third.said(f"devices {gpus[1]},{gpus[0]}")
    third.exit()
    for each in gpus:
        lock_file(each).unlink()


def test_the_number_of_gpus_goes_from_a_place_to_the_supervisor(gpus: list[str], make: Callable[[str], Run]) -> None:
    for devices in (1, 2):
        run = make(f"with-{devices}")
        place = Place(LocalTransport(), str(run.path), command=(sys.executable, "-I", "-S", "-c", SHOW))
        asyncio.run(place.launch(gpu=True, devices=devices))
        run.said(f"devices {','.join(gpus[:devices])}")
        run.exit()
        assert [line["gpu"] for line in run.lines("started")] == [",".join(gpus[:devices])]
        assert read_start(run.path).gpu == ",".join(gpus[:devices])
    for each in gpus:
        lock_file(each).unlink()


@pytest.mark.parametrize(
    ("visible", "devices", "said"),
    [
        (None, 4, "train.devices: 4: nvidia-smi knows 2 GPUs"),
        ("1", 2, "train.devices: 2: CUDA_VISIBLE_DEVICES=1 gives 1 GPU"),
        ("0,-1,1", 2, "train.devices: 2: CUDA_VISIBLE_DEVICES=0,-1,1 gives 1 GPU"),
        ("0,0", 2, "train.devices: 2: CUDA_VISIBLE_DEVICES=0,0 gives 1 GPU"),
        ("0,7", 2, "CUDA_VISIBLE_DEVICES=7: nvidia-smi knows 0, 1"),
    ],
)
def test_fewer_gpus_than_devices_are_refused_with_both_numbers(
    gpus: list[str],
    make: Callable[[str], Run],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    devices: int,
    said: str,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run = make("run")
    refused = start(run, SHOW, "--devices", str(devices))
    assert (refused.returncode, refused.stderr) == (1, f"supervisor: {said}\n")
    assert not (run.path / "supervisor.jsonl").exists()
    assert not any(lock_file(each).exists() for each in gpus)


def test_no_devices_are_no_number_of_gpus(gpus: list[str], make: Callable[[str], Run]) -> None:
    refused = start(make("run"), SHOW, "--devices", "0")
    assert (refused.returncode, "--devices: expected 1 or more" in refused.stderr) == (2, True)


def test_of_several_gpus_all_are_locked_or_none(gpus: list[str], tmp_path: Path) -> None:
    low, high = sorted(gpus)
    held = lock_gpu(high, tmp_path / "other", "1")
    with pytest.raises(Refused, match=f"GPU {high} is busy: run other"):
        lock_gpus(gpus, tmp_path / "mine", "2")
    os.close(lock_gpu(low, tmp_path / "third", "3"))  # refused, if it was kept
    os.close(held)
    for lock in lock_gpus(gpus, tmp_path / "mine", "2"):
        os.close(lock)
    for each in gpus:
        lock_file(each).unlink()


def test_whatever_their_order_the_lock_of_the_same_gpu_is_taken_first(gpus: list[str], tmp_path: Path) -> None:
    # Else each of two runs could get one, and both would be refused.
    held = lock_gpus(gpus, tmp_path / "other", "1")
    for order in (gpus, gpus[::-1]):
        with pytest.raises(Refused, match=f"GPU {min(gpus)} is busy"):
            lock_gpus(order, tmp_path / "mine", "2")
    for lock in held:
        os.close(lock)
    for each in gpus:
        lock_file(each).unlink()


def test_the_gpus_are_not_free_while_one_of_them_is_held(gpus: list[str], make: Callable[[str], Run]) -> None:
    run = make("run")
    # A child that left the group, and let go of the first GPU alone.
    lock = lock_file(gpus[0]).resolve()
    script = (
        "import glob, os, time\nif os.fork() == 0:\n os.setsid()\n"
        f" first = [fd for fd in glob.glob('/proc/self/fd/*') if os.path.realpath(fd) == '{lock}']\n"
        " os.close(int(os.path.basename(*first)))\n"
        " open('child', 'w').write(str(os.getpid()))\n time.sleep(600)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    assert start(run, script, "--devices", "2").returncode == 0
    run.said("up")
    until(lambda: (run.path / "child").exists() and (run.path / "child").read_text(), "the child")
    supervisor = run.status()["supervisor"]
    assert isinstance(supervisor, dict)
    os.kill(supervisor["pid"], 9)
    told = stopped(run)
    assert (told.gpu_free, told.cancelled) == (False, False)
    assert told.gpu_problem == f"a process of the run still holds the lock of {gpus[1]}"
    assert "the GPUs are NOT free: a process of the run" in told.describe()
    os.kill(int((run.path / "child").read_text()), 9)
    until(lambda: stopped(run).gpu_free, "the lock to be let go")
    for each in gpus:
        lock_file(each).unlink()


def test_a_process_of_the_run_in_a_session_of_its_own_is_looked_for_on_the_gpus(
    tmp_path: Path, gpus: list[str], make: Callable[[str], Run]
) -> None:
    run = make("run")
    # As torchrun starts the processes that train; it ends with its parent, and so is no orphan.
    script = (
        "import os, time\nparent = os.getpid()\nif os.fork() == 0:\n os.setsid()\n"
        " open('child', 'w').write(str(os.getpid()))\n"
        " while os.getppid() == parent:\n  time.sleep(0.002)\n os._exit(0)\n"
        "print('up', flush=True)\ntime.sleep(600)\n"
    )
    assert start(run, script, "--devices", "2").returncode == 0
    run.said("up")
    until(lambda: (run.path / "child").exists() and (run.path / "child").read_text(), "the child")
    child = (run.path / "child").read_text()
    (tmp_path / "apps").write_text(f"1\n{child}\n")
    told = stopped(run)
    assert (told.state, told.gpu_free) == ("ended", False)
    assert told.gpu_problem == f"nvidia-smi still lists process {child} of the run on one of them"
    for each in gpus:
        lock_file(each).unlink()


def test_variables_come_on_standard_input_and_stand_in_no_argument_list(make: Callable[[str], Run]) -> None:
    run = make("run")
    script = "import os; print('token', os.environ['SECRET_TOKEN'], flush=True)"
    done = start(run, script, "--environment", stdin=json.dumps({"SECRET_TOKEN": "s3cr3t"}))
    assert done.returncode == 0, done.stderr
    run.said("token s3cr3t")
    run.exit()
    recorded = (run.path / "supervisor.jsonl").read_text() + (run.path / "exit.json").read_text() + done.stdout
    assert "s3cr3t" not in recorded
    for wrong in ("", "[]", '{"A": 1}', '{"A": "x\\u0000"}', "{" * 10_000):
        refused = start(make(f"wrong{uuid.uuid4().hex}"), script, "--environment", stdin=wrong)
        assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
        assert "expected a JSON object of texts on standard input" in refused.stderr
