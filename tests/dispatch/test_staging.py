"""The engine, models and data get to a host once and whole: by content, past kills, and two consoles at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from dispatch_rig import ROOT, until

from dispatch.bundle import engine_bundle, tree_hash
from dispatch.environment import base_python, bootstrap, requirements
from dispatch.local_hashes import LocalHashes
from dispatch.ssh import SSHTransport
from dispatch.staging import Staged, bytes_there, find_named, is_named, stage, stage_engine, wanted_files
from dispatch.tool_client import HostToolError
from dispatch.transfer import Progress
from dispatch.transport import LocalTransport, Transport
from engine.errors import ConfigError
from tests.ssh_rig import MISSING, Rig, running_sshd

MIB = 1 << 20
_T = TypeVar("_T")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if MISSING is not None and "CI" not in os.environ:
        pytest.skip(MISSING)
    with running_sshd(tmp_path_factory.mktemp("sshd") / "gx10") as rig:
        yield rig.trusted()


@pytest.fixture
def hashes(tmp_path: Path) -> LocalHashes:
    return LocalHashes(tmp_path / "hashes.json")


def over_ssh(rig: Rig, scenario: Callable[[SSHTransport], Awaitable[_T]]) -> _T:
    async def whole() -> _T:
        transport = SSHTransport(dataclasses.replace(rig.host, python=sys.executable), rig.environ)
        try:
            return await scenario(transport)
        finally:
            await transport.close()

    return asyncio.run(whole())


def here(scenario: Callable[[Transport], Awaitable[_T]]) -> _T:
    async def whole() -> _T:
        return await scenario(LocalTransport())

    return asyncio.run(whole())


def model(path: Path, *sizes: int, seed: int = 0) -> Path:
    for index, size in enumerate(sizes):
        file = path / f"shard-{index}" / "weights.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(random.Random(seed + index).randbytes(size))
    (path / "config.json").write_text("{}")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


# The engine


def test_the_bundle_is_the_same_whenever_and_wherever_its_files_stand(tmp_path: Path) -> None:
    first = engine_bundle()
    for name in first.files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1e9, 1e9))
    (tmp_path / "engine" / "__pycache__").mkdir()
    (tmp_path / "engine" / "__pycache__" / "config.cpython-311.pyc").write_bytes(b"x")
    (tmp_path / "engine" / ".swap").write_bytes(b"x")
    assert engine_bundle(tmp_path).sha256 == first.sha256
    (tmp_path / "engine" / "errors.py").write_text("changed")
    assert engine_bundle(tmp_path).sha256 != first.sha256


def test_the_hash_of_a_tree_depends_on_names_and_contents_and_not_on_their_order() -> None:
    a, b = (1, "a" * 64), (2, "b" * 64)
    assert tree_hash({"x": a, "y": b}) == tree_hash({"y": b, "x": a})
    assert len({tree_hash({"x": a, "y": b}), tree_hash({"x": b, "y": a}), tree_hash({"x": a, "z": b})}) == 3


def test_the_engine_that_arrives_runs_with_nothing_else_of_this_project(sshd: Rig, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    first, second = (over_ssh(sshd, lambda transport: stage_engine(transport, base)) for _ in range(2))
    assert (first.present, second.present) == (0, second.size)
    assert first.path == second.path == f"{base}/engine/{engine_bundle().sha256}"
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": first.path, "PYTHONDONTWRITEBYTECODE": "1"}
    script = "import engine.config, engine.contract, sys; print(engine.config.__file__, 'dispatch' in sys.modules)"
    for argv, expected in (
        (["-P", "-c", script], f"{first.path}/engine/config.py False"),
        (["-P", f"{first.path}/dispatch/supervisor.py", "status", str(tmp_path)], ""),
    ):
        done = subprocess.run(
            [sys.executable, *argv], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == expected, done.stderr
        assert "Traceback" not in done.stderr


# Models and data


def test_a_model_is_sent_once_and_found_by_its_contents(sshd: Rig, tmp_path: Path, hashes: LocalHashes) -> None:
    base = tmp_path / "base"
    source = model(tmp_path / "teacher", 2 * MIB, 10)
    (source / ".cache").mkdir()
    (source / ".cache" / "junk").write_text("x")
    blob = tmp_path / "blob"
    blob.write_bytes(b"{}2")
    (source / "tokenizer.json").symlink_to(blob)
    copy = tmp_path / "copy of it"
    shutil.copytree(source, copy)

    async def scenario(transport: Transport) -> list[Staged]:
        return [await stage(transport, str(base), each, hashes=hashes) for each in (source, source, copy)]

    staged = over_ssh(sshd, scenario)
    assert {each.path for each in staged} == {f"{base}/store/{staged[0].sha256}"}
    assert [each.present for each in staged] == [0, staged[0].size, staged[0].size]
    found = contents(Path(staged[0].path))
    assert found == {name: data for name, data in contents(source).items() if not name.startswith(".cache")}
    assert found["tokenizer.json"] == b"{}2"
    assert sorted(each.name for each in (base / "store").iterdir()) == [
        f"{staged[0].sha256}",
        f"{staged[0].sha256}.json",
    ]
    assert not Path(staged[0].path, "tokenizer.json").is_symlink()


def test_one_file_is_staged_under_its_own_name(tmp_path: Path, hashes: LocalHashes) -> None:
    (tmp_path / "corpus.txt").write_text("some text")
    staged = here(lambda transport: stage(transport, str(tmp_path / "base"), tmp_path / "corpus.txt", hashes=hashes))
    assert staged.path == f"{tmp_path}/base/store/{staged.sha256}/corpus.txt"
    assert Path(staged.path).read_text() == "some text"


def test_a_staged_file_that_was_damaged_is_noticed_and_replaced(tmp_path: Path, hashes: LocalHashes) -> None:
    source, said = model(tmp_path / "m", MIB), list[str]()

    async def scenario(transport: Transport) -> Staged:
        return await stage(transport, str(tmp_path / "base"), source, hashes=hashes, say=said.append)

    place = Path(here(scenario).path)
    victim = place / "shard-0" / "weights.safetensors"
    victim.chmod(0o600)
    data = bytearray(victim.read_bytes())
    times = victim.stat()
    data[1000] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert here(scenario).present == 0
    assert contents(place) == contents(source)
    assert any("is damaged and was set aside" in line for line in said)
    assert len([each for each in place.parent.iterdir() if "damaged" in each.name]) == 1


def test_a_staged_model_that_nobody_touched_is_not_read_again(tmp_path: Path, hashes: LocalHashes) -> None:
    source = model(tmp_path / "m", MIB)

    async def scenario(transport: Transport) -> Staged:
        return await stage(transport, str(tmp_path / "base"), source, hashes=hashes)

    place = Path(here(scenario).path)
    record = Path(f"{place}.json")
    # What is on record for the file as it stands is believed: with another hash there it is another file.
    known = json.loads(record.read_text())
    assert all(len(entry[-1]) == 64 for entry in known.values())
    before = record.stat().st_ino
    assert here(scenario).present > 0
    assert record.stat().st_ino == before
    record.unlink()
    assert here(scenario).present > 0
    assert json.loads(record.read_text()) == known


def test_what_is_there_is_told_without_changing_anything(sshd: Rig, tmp_path: Path, hashes: LocalHashes) -> None:
    source, base = model(tmp_path / "m", MIB, 2 * MIB), tmp_path / "base"
    size = 3 * MIB + 2

    def there() -> int:
        before = tree_of(base)
        wanted = wanted_files(str(base), source, hashes)
        told = over_ssh(sshd, lambda transport: bytes_there(transport, wanted, python=sys.executable))
        assert tree_of(base) == before
        return told

    assert there() == 0
    place = Path(here(lambda transport: stage(transport, str(base), source, hashes=hashes)).path)
    assert there() == size
    assert (
        over_ssh(
            sshd, lambda transport: bytes_there(transport, wanted_files(str(base), source, hashes), python="/no/python")
        )
        == 0
    )
    weights = place / "shard-1" / "weights.safetensors"
    data = weights.read_bytes()
    weights.chmod(0o600)
    weights.write_bytes(b"x" + data[1:])
    assert there() == 0
    part = place.rename(f"{place}.part")
    (part / "shard-1" / "weights.safetensors").unlink()
    (part / "shard-1" / "weights.safetensors.part").write_bytes(data[:1000])
    assert there() == MIB + 1000 + 2


def tree_of(path: Path) -> dict[str, tuple[int, int, int]]:
    found = {each: each.lstat() for each in path.rglob("*")}
    return {str(each): (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for each, stat in found.items()}


def test_a_path_of_the_host_is_named_and_not_sent(sshd: Rig, tmp_path: Path) -> None:
    there = model(tmp_path / "there", 10)
    assert is_named(f"gx10:{there}")
    assert is_named("gx10:~/models/x")
    assert not any(map(is_named, (str(there), "builtin:teacher", "gx10:models", "C:\\models")))
    assert over_ssh(sshd, lambda transport: find_named(transport, f"gx10:{there}")) == str(there)
    with pytest.raises(ConfigError, match="no such file or directory there"):
        over_ssh(sshd, lambda transport: find_named(transport, f"gx10:{there}/nothing"))
    with pytest.raises(ConfigError, match="is on other, but the run goes to gx10"):
        over_ssh(sshd, lambda transport: find_named(transport, f"other:{there}"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or directory"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: (path.mkdir(), subprocess.run(["mkfifo", path / "pipe"], check=True)), "is no file"),
        (lambda path: (path.mkdir(), (path / "a\nb").write_text("x")), "control or unreadable characters"),
        (lambda path: (path.mkdir(), (path / "gone").symlink_to("nowhere")), "is no file"),
    ],
)
def test_what_cannot_be_staged_is_told(
    tmp_path: Path, hashes: LocalHashes, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        here(lambda transport: stage(transport, str(tmp_path / "base"), tmp_path / "source", hashes=hashes))


# Interrupted, and two at once

CONSOLE = """
import asyncio, dataclasses, json, sys
from pathlib import Path
from dispatch.hosts import Host
from dispatch.local_hashes import LocalHashes
from dispatch.ssh import SSHTransport
from dispatch.staging import stage
port, identity, environ, source, base = json.loads(sys.argv[1])
host = Host("gx10", address="127.0.0.1", port=port, identity=Path(identity), python=sys.executable)
async def main():
    told = lambda progress: print(progress.done, flush=True)
    staged = await stage(SSHTransport(host, environ), base, source, progress=told,
        say=lambda line: print(line, file=sys.stderr, flush=True), hashes=LocalHashes(Path(base + ".hashes")))
    print("present", staged.present, flush=True)
asyncio.run(main())
"""


def console(rig: Rig, source: Path, base: Path) -> subprocess.Popen[str]:
    given = json.dumps([rig.port, str(rig.identity), rig.environ, str(source), str(base)])
    argv = [sys.executable, "-P", "-c", CONSOLE, given]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")


def parts(base: Path) -> int:
    return sum(each.stat().st_size for each in base.glob("store/*.part/**/*") if each.is_file())


def test_staging_goes_on_after_its_console_was_killed(sshd: Rig, tmp_path: Path) -> None:
    source, base = model(tmp_path / "m", 8 * MIB, 64 * MIB), tmp_path / "base"
    first = console(sshd, source, base)
    assert first.stdout is not None
    for line in first.stdout:
        if int(line) >= 20 * MIB:
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not [each for each in (base / "store").iterdir() if len(each.name) == 64]
    held = parts(base)
    assert held >= 20 * MIB
    second = console(sshd, source, base)
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert 20 * MIB <= int(output.split()[-1]) <= 72 * MIB
    (place,) = [each for each in (base / "store").iterdir() if each.is_dir()]
    assert contents(place) == contents(source)


def test_staging_goes_on_through_killed_connections(
    sshd: Rig, tmp_path: Path, hashes: LocalHashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatch.transfer.PROGRESS_SECONDS", 0.0)
    source, said, kills = model(tmp_path / "m", 4 * MIB, 40 * MIB, 4 * MIB), list[str](), [8 * MIB, 24 * MIB, 46 * MIB]

    def kill(progress: Progress) -> None:
        if kills and progress.done >= kills[0]:
            kills.pop(0)
            for pid in sshd.sessions():
                os.kill(pid, signal.SIGKILL)

    async def scenario(transport: Transport) -> Staged:
        return await stage(transport, str(tmp_path / "base"), source, progress=kill, say=said.append, hashes=hashes)

    staged = over_ssh(sshd, scenario)
    assert not kills
    assert sum("connection lost" in line for line in said) >= 2
    assert staged.present >= 24 * MIB
    assert contents(Path(staged.path)) == contents(source)


def test_two_consoles_at_once_both_succeed_and_one_of_them_sends(sshd: Rig, tmp_path: Path) -> None:
    source, base = model(tmp_path / "m", 3 * MIB, 24 * MIB), tmp_path / "base"
    consoles = [console(sshd, source, base) for _ in range(2)]
    outputs = [each.communicate(timeout=90) for each in consoles]
    assert [each.returncode for each in consoles] == [0, 0], outputs
    size = sum(map(len, contents(source).values()))
    assert sorted(int(output.split()[-1]) for output, _ in outputs) == [0, size]
    (place,) = [each for each in (base / "store").iterdir() if each.is_dir()]
    assert contents(place) == contents(source)
    until(lambda: not list((base / "store").glob("*.part")), "no part to be left")


# Hashes of local files


def old(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_hash_is_remembered_until_the_file_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old(tmp_path / "big", b"x" * MIB)
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr("dispatch.local_hashes.time.time_ns", lambda: later)
    first = LocalHashes(tmp_path / "hashes.json")
    expected = first.sha256(path)
    first.save()
    opened = LocalHashes(tmp_path / "hashes.json")
    monkeypatch.setattr("dispatch.local_hashes.hashlib.sha256", lambda: pytest.fail("it was read again"))
    assert opened.sha256(path) == expected
    monkeypatch.undo()
    times = path.stat()
    path.write_bytes(b"y" * MIB)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert LocalHashes(tmp_path / "hashes.json").sha256(path) != expected


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    # Within the clock's grain it could be written to again with the same size and times.
    hashes = LocalHashes(tmp_path / "hashes.json")
    hashes.sha256(old(tmp_path / "big", b"x" * MIB))
    hashes.save()
    assert not (tmp_path / "hashes.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"/x": [1, 2, 3]}', "\x00"])
def test_remembered_hashes_that_cannot_be_read_are_done_without(tmp_path: Path, text: str) -> None:
    (tmp_path / "hashes.json").write_text(text)
    hashes = LocalHashes(tmp_path / "hashes.json")
    assert hashes.sha256(old(tmp_path / "f", b"abc"))[0] == 3
    hashes.save()


# The environment


def test_a_host_is_given_the_engines_needs_and_none_of_the_consoles() -> None:
    names = {line.split("<")[0].split(">")[0] for line in requirements()}
    assert names == {"torch", "transformers", "safetensors", "tokenizers", "msgspec", "pyyaml", "numpy"}
    assert all("<" in line and ">=" in line for line in requirements())


def test_an_environment_is_made_once_and_keeps_the_torch_that_is_there(
    sshd: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    host = dataclasses.replace(sshd.host, python=sys.executable, run_dir=str(tmp_path / "base"), env=("PIP_NO_INDEX",))
    environ = {"PIP_NO_INDEX": "1", "SECRET": "s"}

    async def scenario(transport: Transport) -> None:
        first = await bootstrap(transport, host, said.append, environ=environ)
        assert (first.made, first.own_torch, first.base) == (True, True, sys.executable)
        assert first.python == f"{tmp_path}/base/venv/bin/python"
        assert first.engine == f"{tmp_path}/base/engine/{engine_bundle().sha256}"
        assert first.torch == importlib.metadata.version("torch")
        # It takes seconds, and was seen to work a moment ago.
        monkeypatch.setattr("dispatch.environment._VERIFY", 'print(\'{"torch": "x", "cuda": null, "devices": 0}\')')
        second = await bootstrap(transport, host, said.append, environ=environ)
        assert second == dataclasses.replace(first, made=False, torch="x")
        from_itself = dataclasses.replace(host, python="")
        assert await base_python(transport, from_itself) == first.python
        assert await bootstrap(transport, from_itself, said.append, environ=environ) == second

    over_ssh(sshd, scenario)
    assert any("keeping the torch" in line for line in said)
    assert not list((tmp_path / "base" / "venv").glob("lib*/python*/site-packages/torch"))


@pytest.mark.slow
def test_what_pip_cannot_install_is_told_and_the_next_attempt_goes_on(
    sshd: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    host = dataclasses.replace(sshd.host, python=sys.executable, run_dir=str(tmp_path / "base"), env=("PIP_NO_INDEX",))
    monkeypatch.setattr("dispatch.environment.requirements", lambda: ["no-such-package-at-all>=1"])
    with pytest.raises(HostToolError, match=r"pip ended with code 1: ERROR: No matching distribution.*no-such-package"):
        over_ssh(sshd, lambda transport: bootstrap(transport, host, said.append, environ={"PIP_NO_INDEX": "1"}))
    monkeypatch.setattr("dispatch.environment.requirements", lambda: ["torch>=99", "numpy"])
    monkeypatch.setattr("dispatch.environment._VERIFY", 'print(\'{"torch": "x", "cuda": null, "devices": 0}\')')
    made = over_ssh(sshd, lambda transport: bootstrap(transport, host, said.append, environ={"PIP_NO_INDEX": "1"}))
    assert made.made
    assert sum("making" in line for line in said) == 1


def test_a_python_that_does_not_run_is_told(sshd: Rig, tmp_path: Path) -> None:
    host = dataclasses.replace(sshd.host, python="/no/such/python", run_dir=str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"/no/such/python is no Python of 3\.11 or newer"):
        over_ssh(sshd, lambda transport: bootstrap(transport, host, print))


def test_an_apr_file_goes_with_the_tokenizer_that_lies_beside_it(tmp_path: Path, hashes: LocalHashes) -> None:
    source = tmp_path / "models"
    source.mkdir()
    (source / "teacher.apr").write_bytes(b"APR\0" + bytes(200))
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text("{ }")
    (source / "other.apr").write_bytes(b"APR\0" + bytes(300))
    (source / "notes.txt").write_text("not of the model")
    staged = here(lambda transport: stage(transport, str(tmp_path / "base"), source / "teacher.apr", hashes=hashes))
    assert Path(staged.path).name == "teacher.apr"
    assert set(contents(Path(staged.path).parent)) == {"teacher.apr", "tokenizer.json", "generation_config.json"}
    (source / "tokenizer.json").write_text("{    }")
    again = here(lambda transport: stage(transport, str(tmp_path / "base"), source / "teacher.apr", hashes=hashes))
    assert again.sha256 != staged.sha256
    alone = here(lambda transport: stage(transport, str(tmp_path / "base"), source / "notes.txt", hashes=hashes))
    assert set(contents(Path(alone.path).parent)) == {"notes.txt"}
