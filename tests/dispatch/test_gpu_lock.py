"""One run a GPU: the second is refused by name, until the last process of the first is gone."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from dispatch_rig import Run, until

from dispatch.supervisor import LOCK_DIRECTORIES

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
SHOW = "import os; print('devices', os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)"


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two GPUs of this test's own: nvidia-smi as it answers on a host that has them."""
    uuids = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    rows = "".join(f"{index}, {name}\\n" for index, name in enumerate(uuids))
    program.write_text(f"#!/bin/sh\nprintf '{rows}'\n")
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
