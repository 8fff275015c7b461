"""The tool on the host, run as it travels: what it answers, and what it will not touch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatch import host_tool, supervisor
from dispatch.tool_client import source


def ask(op: str, *, environ: dict[str, str] | None = None, **arguments: object) -> dict[str, Any]:
    """One request with one answer, the last line; the tool gets nothing of this project."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", source()],
        input=json.dumps({"op": op, **arguments}) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **(environ or {})},
        check=False,
    )
    assert not done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert ("error" in answer) == (done.returncode != 0)
    return answer


def make(path: Path, data: bytes) -> list[object]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return [path.name, len(data), hashlib.sha256(data).hexdigest()]


def test_it_is_one_file_of_the_standard_library_that_fits_into_an_argument(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('dispatch', 'engine', 'msgspec', 'yaml'))); exec(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, source()], input=b'{"op": "x"}', capture_output=True, check=False
    )
    assert json.loads(done.stdout)["error"] == "'x': no such operation"
    assert len(source().encode()) < 100_000  # Linux takes 128 KiB


def test_hashes_are_told_for_files_and_reasons_for_what_is_none(tmp_path: Path) -> None:
    _, size, sha256 = make(tmp_path / "f", b"abc")
    (tmp_path / "link").symlink_to("f")
    os.mkfifo(tmp_path / "pipe")
    paths = [str(tmp_path / name) for name in ("f", "link", "pipe", "missing", "")]
    found = ask("hash", paths=paths)["files"]
    assert found[0] == {"path": paths[0], "size": size, "sha256": sha256}
    assert all("error" in each for each in found[1:])


@pytest.mark.parametrize("path", ["relative", "", "-x", 3, None, "a/../b", "/x\0y"])
def test_a_path_that_is_not_absolute_is_refused(path: object) -> None:
    assert "no absolute path" in ask("tree", root=path)["error"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "link/x", "linked"])
def test_nothing_outside_its_directory_is_sent_or_taken(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    make(tmp_path / "x", b"secret")
    make(root / "f", b"abc")
    (root / "link").symlink_to(tmp_path)
    (root / "linked").symlink_to(tmp_path / "x")
    assert ask("send", root=str(root), files=[[name, 0, None, None]])["error"]
    answer = ask("receive", root=str(root), files=[[name, 6, hashlib.sha256(b"secret").hexdigest()]])
    assert answer.get("error"), answer
    assert (tmp_path / "x").read_bytes() == b"secret"
    assert not list(tmp_path.rglob("*.part"))


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda each: st.lists(each, max_size=3)))
def test_a_name_is_below_its_directory_or_refused(name: object) -> None:
    try:
        parts = host_tool.parts_of(name)
    except host_tool.Refused:
        return
    assert parts
    assert not {"", ".", ".."} & set(parts)


@pytest.mark.parametrize(
    "request_line", ["", "x", "[]", "{}", '{"op": 1}', '{"op": "hash"}', '{"op": "send", "root": "/", "files": [3]}']
)
def test_a_request_that_cannot_be_read_is_one_line_and_no_traceback(request_line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", source()], input=request_line, capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout)["error"]
    assert (done.returncode, done.stderr) == (1, "")


def test_a_sender_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    hasty = source().replace("IDLE_SECONDS = 30.0", "IDLE_SECONDS = 0.3")
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", hasty], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"op": "receive", "root": str(tmp_path), "files": [["f", 10, None]]}) + "\n")
    process.stdin.write('{"from": [0]}\nabc')
    process.stdin.flush()
    assert "have" in process.stdout.readline()
    answer = json.loads(process.stdout.readline())
    assert "nothing has come from the console for too long" in answer["error"]
    process.stdin.close()
    process.stdout.close()
    assert process.wait(20) == 1
    assert (tmp_path / "f.part").read_bytes() == b"abc"


def test_a_finished_tree_is_placed_once_and_a_second_one_finds_it(tmp_path: Path) -> None:
    places = []
    for name in ("one", "two"):
        files = [make(tmp_path / "store" / name / each, each.encode()) for each in ("a", "b")]
        make(tmp_path / "store" / name / "stray", b"x")
        places.append(
            ask("place", root=str(tmp_path / "store" / name), place=str(tmp_path / "store" / "p"), files=files)
        )
    assert [each["present"] for each in places] == [False, True]
    assert sorted(each.name for each in (tmp_path / "store" / "p").iterdir()) == ["a", "b"]


def test_a_tree_that_is_not_what_it_should_be_is_not_placed(tmp_path: Path) -> None:
    files = [make(tmp_path / "one" / "a", b"a")]
    make(tmp_path / "one" / "a", b"b")
    assert (
        "is not what it should be" in ask("place", root=f"{tmp_path}/one", place=f"{tmp_path}/p", files=files)["error"]
    )
    assert not (tmp_path / "p").exists()


# Facts

SMI = """#!/bin/sh
case "$1" in
--query-gpu=*) printf '%s\\n' "$DEVICES" ;;
--query-compute-apps=*) printf '%s\\n' "$PROCESSES" ;;
"") printf '%s\\n' "$HEAD" ;;
esac
exit ${CODE:-0}
"""
GB10 = "0, GPU-1, NVIDIA GB10, 580.1, [N/A], [N/A], 12.1, [N/A]"


def smi(directory: Path, **environ: str) -> dict[str, str]:
    directory.mkdir()
    (directory / "nvidia-smi").write_text(SMI)
    (directory / "nvidia-smi").chmod(0o700)
    return {"PATH": f"{directory}:{os.environ['PATH']}", **environ}


def test_facts_tell_what_this_machine_is(tmp_path: Path) -> None:
    facts = ask("facts", base=str(tmp_path / "not" / "there"), packages=["numpy", "no-such-package"])
    assert facts["hostname"] == socket.gethostname()
    assert facts["executable"] == sys.executable
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert abs(facts["time"] - time.time()) < 60
    assert facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["packages"]["numpy"]
    assert facts["packages"]["no-such-package"] is None
    assert (facts["base"]["exists"], facts["base"]["writable"]) == (False, True)
    free = shutil.disk_usage(tmp_path).free
    assert abs(facts["base"]["disk"]["free"] - free) < 10 << 30
    assert not list(tmp_path.iterdir())


def test_torch_is_found_with_its_cuda_and_without_importing_it(tmp_path: Path) -> None:
    for name, text in {
        "torch/__init__.py": "raise SystemExit('imported')",
        "torch/version.py": "__version__ = '2.9.0a0+nv25'\ncuda: Optional[str] = '13.0'\nhip = None\n",
        "torch-2.9.0a0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0a0\n",
    }.items():
        make(tmp_path / name, text.encode())
    facts = ask("facts", base="/", environ={"PYTHONPATH": str(tmp_path)})
    assert facts["torch"] == {"version": "2.9.0a0+nv25", "cuda": "13.0"}


def test_devices_and_who_computes_on_them_are_told(tmp_path: Path) -> None:
    environ = smi(
        tmp_path / "bin",
        DEVICES="0, GPU-1, NVIDIA H100 80GB HBM3, 570.1, 81559, 1024, 9.0, 80000",
        PROCESSES=f"{os.getpid()}, GPU-1, 512, python",
    )
    facts = ask("facts", base=str(tmp_path), environ=environ)
    assert facts["devices"] == [
        {
            "index": 0,
            "uuid": "GPU-1",
            "name": "NVIDIA H100 80GB HBM3",
            "driver": "570.1",
            "memory_total": 81559 << 20,
            "memory_used": 1024 << 20,
            "memory_free": 80000 << 20,
            "capability": "9.0",
        }
    ]
    assert facts["unified_memory"] is False
    (process,) = facts["processes"]
    assert (process["pid"], process["uid"], process["memory"]) == (os.getpid(), os.getuid(), 512 << 20)
    assert process["command"].startswith(sys.executable) or "pytest" in process["command"]


def test_a_device_without_memory_figures_shares_the_hosts(tmp_path: Path) -> None:
    environ = smi(tmp_path / "bin", DEVICES=GB10, PROCESSES="1, GPU-1, 300, x")
    facts = ask("facts", base=str(tmp_path), environ=environ)
    assert facts["unified_memory"] is True
    assert facts["devices"][0]["memory_total"] is None
    assert facts["processes"][0]["memory"] == 300 << 20
    assert facts["memory"]["available"] > 0


def test_what_nvidia_smi_complains_of_is_told(tmp_path: Path) -> None:
    environ = smi(tmp_path / "bin", DEVICES="NVIDIA-SMI has failed because of the driver", CODE="9")
    facts = ask("facts", base=str(tmp_path), environ=environ)
    assert (facts["devices"], facts["nvidia_smi"]) == ([], "NVIDIA-SMI has failed because of the driver")


@pytest.mark.parametrize(
    ("head", "cuda"),
    [
        ("| NVIDIA-SMI 550.40.07   Driver Version: 550.40.07   CUDA Version: 12.4  |", "12.4"),
        ("| NVIDIA-SMI 610.43.02   KMD Version: 610.43.02   CUDA UMD Version: 13.3 |", "13.3"),
        ("| NVIDIA-SMI 331.62      Driver Version: 331.62                         |", None),
    ],
)
def test_the_newest_cuda_of_the_driver_is_read_from_old_and_new_tables(
    tmp_path: Path, head: str, cuda: str | None
) -> None:
    assert ask("facts", base="/", environ=smi(tmp_path / "bin", DEVICES=GB10, HEAD=head))["driver_cuda"] == cuda


@pytest.mark.parametrize(
    ("given", "environ", "gpu", "hidden", "said"),
    [
        ({}, {}, "GPU-a0", False, None),
        ({}, {"CUDA_VISIBLE_DEVICES": "1"}, "GPU-b1", False, None),
        ({"visible": "1,0"}, {"CUDA_VISIBLE_DEVICES": "0"}, "GPU-b1", False, None),
        ({"visible": "GPU-b"}, {}, "GPU-b1", False, None),
        ({"visible": ""}, {}, None, True, None),
        ({"visible": "-1"}, {}, None, True, None),
        ({"visible": "7"}, {}, None, False, "CUDA_VISIBLE_DEVICES=7: nvidia-smi knows 0, 1"),
        ({"visible": "MIG-x"}, {}, "MIG-x", False, None),
    ],
)
def test_the_device_is_the_one_that_a_run_would_be_given(
    tmp_path: Path, given: dict[str, str], environ: dict[str, str], gpu: str | None, hidden: bool, said: str | None
) -> None:
    rows = "0, GPU-a0, A, 1, 1, 1, 9.0, 1\n1, GPU-b1, B, 1, 1, 1, 9.0, 1"
    facts = ask("facts", base="/", environ={**smi(tmp_path / "bin", DEVICES=rows), **environ}, **given)
    assert (facts["gpu"], facts["gpu_hidden"], facts["nvidia_smi"]) == (gpu, hidden, said)
    assert (facts["lock"] is None) == (gpu is None)


@pytest.fixture
def gpu() -> Iterator[tuple[str, Path]]:
    """A GPU of this test's own, and the lock that the supervisor takes for it."""
    device = f"GPU-{uuid.uuid4()}"
    run = Path("runs/20260102-030405-train-abc")
    descriptor = supervisor.lock_gpu(device, run, "1d2e")
    found = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    os.close(descriptor)
    yield device, found
    found.unlink()


def test_a_lock_that_is_held_is_seen_with_its_holder_even_when_its_first_owner_is_gone(gpu: tuple[str, Path]) -> None:
    device, path = gpu
    assert host_tool._gpu_lock(f"GPU-{uuid.uuid4()}")["held"] is False
    free = host_tool._gpu_lock(device)
    assert (free["held"], free["path"]) == (False, str(path))
    # A process locks it, leaves it to its child, and ends: as the supervisor hands it on to the trainer.
    script = (
        "import fcntl, os, sys, time\nf = open(sys.argv[1], 'r+')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
        "if os.fork() == 0:\n os.setsid()\n print(os.getpid(), flush=True)\n time.sleep(600)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    child = int(first.stdout.readline())
    try:
        first.wait(30)
        held = host_tool._gpu_lock(device)
        assert held["held"] is True
        assert held["by"] == f"run 20260102-030405-train-abc (1d2e) of uid {os.getuid()}"
    finally:
        os.kill(child, 9)
        first.stdout.close()
    deadline = time.monotonic() + 20
    while host_tool._gpu_lock(device)["held"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lock_is_seen_in_the_systems_list_and_where_that_lacks_it_in_a_process(gpu: tuple[str, Path]) -> None:
    _, path = gpu
    with path.open("r+") as file, tempfile.TemporaryFile() as other:
        for each in (path, Path("/another/name")):
            assert host_tool._flocked(str(each), os.fstat(file.fileno())) is False
        fcntl.flock(file, fcntl.LOCK_EX)
        assert host_tool._flocked("/another/name", os.fstat(file.fileno())) is True
        assert host_tool._flocked(str(path), os.fstat(other.fileno())) is True
        assert host_tool._flocked("/another/name", os.fstat(other.fileno())) is False


def test_looking_at_a_lock_never_makes_a_start_fail(gpu: tuple[str, Path]) -> None:
    device, _ = gpu
    looks, done = 0, threading.Event()

    def look() -> None:
        nonlocal looks
        while not done.is_set():
            host_tool._gpu_lock(device)
            looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        tries = 0
        while tries < 300 or looks < 30:
            os.close(supervisor.lock_gpu(device, Path("runs/r"), "1"))  # refused, if anybody else had it
            tries += 1
    finally:
        done.set()
        thread.join()


def test_a_link_in_the_place_of_the_lock_is_not_read(gpu: tuple[str, Path], tmp_path: Path) -> None:
    device, path = gpu
    make(tmp_path / "secret", b"secret")
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    assert host_tool._gpu_lock(device) == {"path": str(path), "held": None, "by": None}


def test_what_may_be_a_secret_of_somebody_else_is_left_out_of_a_command() -> None:
    script, python = "import time; time.sleep(600)", sys.executable
    for argv, shown in (
        ([python, "-c", script, "--token=s3cr3t"], f"{python} -c"),
        ([python, "-Xtoken=s3cr3t", "-c", script], f"{python} -Xtoken -c"),
        (["sleep", "600", "601", "602"], "sleep 600 601"),
    ):
        process = subprocess.Popen(argv)
        try:
            deadline = time.monotonic() + 10  # right after its start it is not yet itself
            while (told := host_tool._who(process.pid, "x"))["command"] != shown and time.monotonic() < deadline:
                pass
        finally:
            process.kill()
            process.wait()
        assert told == {"uid": os.getuid(), "user": pwd.getpwuid(os.getuid()).pw_name, "command": shown}
    assert host_tool._who(2**22 + 1, "gone") == {"uid": None, "user": None, "command": "gone"}


def test_paths_that_are_named_are_looked_at(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make(model / "config.json", b'{"a": 1}')
    make(model / "model.safetensors", b"x" * 1000)
    make(model / ".cache" / "big", b"x" * 5000)
    make(tmp_path / "corpus.txt", b"text")
    os.mkfifo(tmp_path / "pipe")
    paths = [str(tmp_path / name) for name in ("model", "corpus.txt", "pipe", "missing", "corpus.txt/below")]
    facts = ask("facts", base="/", named=paths)["named"]
    assert [each["path"] for each in facts] == paths
    assert [each["kind"] for each in facts] == ["directory", "file", "other", None, None]
    assert (facts[0]["config"], facts[0]["weights"], facts[0]["bytes"], facts[0]["files"]) == (
        '{"a": 1}',
        True,
        1008,
        2,
    )
    assert (facts[1]["bytes"], facts[1]["config"], facts[1]["weights"]) == (4, None, False)
    assert "no absolute path" in ask("facts", base="/", named=["relative"])["error"]


def test_a_huge_directory_is_counted_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1", "b/2", "c/3", "d/4"):
        make(tmp_path / name, b"x")
    assert (host_tool._named(str(tmp_path))["files"], host_tool._named(str(tmp_path))["more"]) == (4, False)
    monkeypatch.setattr(host_tool, "NAMED_FILES", 1)
    assert (host_tool._named(str(tmp_path))["files"], host_tool._named(str(tmp_path))["more"]) == (2, True)


def test_the_clock_is_told_as_often_as_it_is_asked_for(tmp_path: Path) -> None:
    request = json.dumps({"op": "facts", "base": str(tmp_path), "clocks": True})
    done = subprocess.run(
        [sys.executable, "-P", "-c", source()],
        input=f'{request}\n{{"clock": true}}\n{{"clock": true}}\n{{}}\n',
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    first, second, facts = map(json.loads, done.stdout.splitlines())
    assert first["time"] <= second["time"] <= facts["time"]
    assert "hostname" in facts


def test_a_base_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    make(tmp_path / "file", b"")
    facts = ask("facts", base=str(tmp_path / "file" / "below"))
    assert (facts["base"]["writable"], facts["base"]["problem"]) == (False, f"{tmp_path}/file is no directory")
    assert ask("facts", base="/proc/kdconsole")["base"]["writable"] is False
