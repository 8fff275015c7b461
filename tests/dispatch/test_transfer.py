"""Files come and go whole: over a real sshd, through lost connections, and past names that no host should give."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import asyncssh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatch import host_tool, ssh_stream, tool_client
from dispatch.getting import get, get_tree
from dispatch.names import check_names, problem
from dispatch.putting import put
from dispatch.ssh import SSHTransport
from dispatch.tool_client import HostToolError
from dispatch.transfer import Meter, Progress, TransferError, Transferred, resuming
from dispatch.transport import LocalTransport, Transport, TransportError
from engine.errors import RunError
from tests.ssh_proxy import Proxy
from tests.ssh_rig import MISSING, Rig, running_sshd

MIB = 1 << 20
_T = TypeVar("_T")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if MISSING is not None and "CI" not in os.environ:
        pytest.skip(MISSING)
    with running_sshd(tmp_path_factory.mktemp("sshd") / "gx10") as rig:
        yield rig.trusted()


@pytest.fixture(params=["here", "over ssh"])
def use(request: pytest.FixtureRequest) -> Callable[[Callable[[Transport], Awaitable[_T]]], _T]:
    """Runs something with a transport: both kinds keep the same promises."""
    if request.param == "here":
        return lambda scenario: asyncio.run(_awaited(scenario(LocalTransport())))
    rig: Rig = request.getfixturevalue("sshd")
    return lambda scenario: over_ssh(rig, scenario)


async def _awaited(result: Awaitable[_T]) -> _T:
    return await result


def over_ssh(rig: Rig, scenario: Callable[[SSHTransport], Awaitable[_T]]) -> _T:
    async def whole() -> _T:
        transport = SSHTransport(dataclasses.replace(rig.host, python=sys.executable), rig.environ)
        try:
            return await scenario(transport)
        finally:
            await transport.close()

    return asyncio.run(whole())


def make(path: Path, size: int, seed: int = 0) -> str:
    """A file of noise; returns its SHA-256."""
    data = random.Random(seed).randbytes(size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


class KillOnce:
    """Kills sshd's session, and with it the connection, as soon as so many bytes are there."""

    def __init__(self, rig: Rig, at: int) -> None:
        self._rig, self._at = rig, at
        self.seen: list[Progress] = []
        self.killed = 0

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)
        if not self.killed and progress.done >= self._at:
            for pid in self._rig.sessions():
                os.kill(pid, signal.SIGKILL)
                self.killed += 1


@pytest.fixture
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is on its way at a time and all of it is told, so that a test can step in between."""
    monkeypatch.setattr("dispatch.ssh_stream.WINDOW", 2 * MIB)
    monkeypatch.setattr("dispatch.transfer.PROGRESS_SECONDS", 0.0)


# Whole files

Use = Callable[[Callable[[Transport], Awaitable[object]]], object]


@pytest.mark.parametrize("size", [0, 1, 3 * MIB + 17])
def test_a_file_comes_and_goes_with_its_bytes_and_hash(use: Use, tmp_path: Path, size: int) -> None:
    sha256 = make(tmp_path / "source", size)
    expected = Transferred(size, sha256, 0)
    there, here = tmp_path / "a" / "there", tmp_path / "b" / "here"

    async def scenario(transport: Transport) -> None:
        assert await put(transport, tmp_path / "source", str(there)) == expected
        assert await get(transport, str(there), here, sha256=sha256, size=size) == expected

    use(scenario)
    for path in (there, here):
        assert path.read_bytes() == (tmp_path / "source").read_bytes()
        assert path.stat().st_mode & 0o777 == 0o600
        assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_what_is_there_already_is_not_sent_again(use: Use, tmp_path: Path) -> None:
    sha256 = make(tmp_path / "source", MIB)

    async def scenario(transport: Transport) -> None:
        for expected in (0, MIB):
            sent = await put(transport, tmp_path / "source", str(tmp_path / "there"), sha256=sha256)
            fetched = await get(transport, str(tmp_path / "there"), tmp_path / "here", sha256=sha256)
            assert (sent.resumed, fetched.resumed) == (expected, expected)

    use(scenario)


def test_other_contents_are_replaced(use: Use, tmp_path: Path) -> None:
    sha256 = make(tmp_path / "source", 5000)
    make(tmp_path / "there", 9000, 1)
    make(tmp_path / "here", 5000, 2)

    async def scenario(transport: Transport) -> None:
        await put(transport, tmp_path / "source", str(tmp_path / "there"), sha256=sha256)
        await get(transport, str(tmp_path / "there"), tmp_path / "here", sha256=sha256)

    use(scenario)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "source").read_bytes()


def test_no_packet_is_sent_for_nothing(tmp_path: Path) -> None:
    if MISSING is not None and "CI" not in os.environ:
        pytest.skip(MISSING)
    make(tmp_path / "source", 2 * MIB)
    with running_sshd(tmp_path / "gx10", "LogLevel DEBUG3") as rig:
        over_ssh(rig.trusted(), lambda transport: put(transport, tmp_path / "source", str(tmp_path / "there")))
        said = rig.log
    assert "Starting session: command" in said
    assert "SSH2_MSG_IGNORE" not in said


def test_only_a_host_that_is_far_away_may_send_far_ahead(
    sshd: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "source", MIB)
    windows, real = list[int](), ssh_stream.SSHStream.connection_made

    def look(self: ssh_stream.SSHStream, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        real(self, chan)
        windows.append(chan.get_recv_window())

    async def fetch(port: int) -> int:
        transport = SSHTransport(dataclasses.replace(sshd.host, python=sys.executable, port=port), sshd.environ)
        await get(transport, str(tmp_path / "source"), tmp_path / "here")
        await transport.close()
        return windows[-1]

    async def scenario() -> None:
        async with Proxy(sshd.port) as proxy:
            sshd.trusted(proxy.port)
            proxy.delay = 0.1
            assert await fetch(proxy.port) == ssh_stream.WINDOW
        for _ in range(20):  # on a machine that is busy the host next door seems far away
            if await fetch(sshd.port) < ssh_stream.WINDOW:
                return
        raise AssertionError(windows)

    monkeypatch.setattr(ssh_stream.SSHStream, "connection_made", look)
    monkeypatch.setattr(ssh_stream, "RATE", ssh_stream.WINDOW * 5)
    asyncio.run(scenario())


def test_what_is_received_takes_no_new_memory_for_each_piece(tmp_path: Path) -> None:
    few, many = (_page_faults(tmp_path / str(size), random.Random(0).randbytes(size)) for size in (MIB, 32 * MIB))
    assert many - few < 31 * MIB // 4096 // 4


def _page_faults(target: Path, data: bytes) -> int:
    """Of a tool that receives this, from a socket as sshd's commands have one."""
    request = {"op": "receive", "root": str(target.parent), "files": [[target.name, len(data), None]]}
    here, there = socket.socketpair()
    command = [sys.executable, "-P", host_tool.__file__]
    with here, subprocess.Popen(command, stdin=there.fileno(), stdout=subprocess.PIPE) as tool:
        there.close()
        assert tool.stdout is not None
        here.sendall(json.dumps(request).encode() + b"\n")
        tool.stdout.readline()
        here.sendall(b'{"from": [0]}\n' + data + hashlib.sha256(data).digest())
        told = tool.stdout.read().splitlines()[-1]
        faults = os.wait4(tool.pid, 0)[2].ru_minflt
        tool.returncode = 0
    assert json.loads(told)["done"] is True
    assert target.read_bytes() == data
    return faults


# Resumed files


def test_a_part_is_gone_on_with_where_it_ends(use: Use, tmp_path: Path) -> None:
    sha256 = make(tmp_path / "source", 2 * MIB)
    beginning = (tmp_path / "source").read_bytes()[: MIB + 5]
    (tmp_path / "here.part").write_bytes(beginning)
    (tmp_path / "there.part").write_bytes(beginning)

    async def scenario(transport: Transport) -> None:
        assert (await get(transport, str(tmp_path / "source"), tmp_path / "here")).resumed == MIB + 5
        assert (await put(transport, tmp_path / "source", str(tmp_path / "there"))).resumed == MIB + 5

    use(scenario)
    for name in ("here", "there"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("damage", ["another beginning", "longer than the file"])
def test_a_part_of_something_else_is_begun_anew(use: Use, tmp_path: Path, damage: str) -> None:
    make(tmp_path / "source", 2 * MIB)
    whole = (tmp_path / "source").read_bytes()
    part = b"x" + whole[1:MIB] if damage == "another beginning" else whole + b"more"
    (tmp_path / "here.part").write_bytes(part)
    (tmp_path / "there.part").write_bytes(part)

    async def scenario(transport: Transport) -> None:
        assert (await get(transport, str(tmp_path / "source"), tmp_path / "here")).resumed == 0
        assert (await put(transport, tmp_path / "source", str(tmp_path / "there"))).resumed == 0

    use(scenario)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes() == whole


@pytest.mark.usefixtures("step_by_step")
def test_a_fetch_whose_connection_is_killed_goes_on_where_it_was(sshd: Rig, tmp_path: Path) -> None:
    sha256 = make(tmp_path / "source", 24 * MIB)
    kill, said = KillOnce(sshd, 6 * MIB), list[str]()

    async def scenario(transport: Transport) -> Transferred:
        return await resuming(
            lambda: get(transport, str(tmp_path / "source"), tmp_path / "here", sha256=sha256, progress=kill),
            say=said.append,
        )

    fetched = over_ssh(sshd, scenario)
    assert kill.killed
    assert fetched.sha256 == sha256
    assert 6 * MIB <= fetched.resumed < 24 * MIB
    assert any("connection lost" in line for line in said)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.usefixtures("step_by_step")
def test_a_sending_whose_connection_is_killed_goes_on_where_it_was(sshd: Rig, tmp_path: Path) -> None:
    sha256 = make(tmp_path / "source", 24 * MIB)
    kill = KillOnce(sshd, 6 * MIB)

    async def scenario(transport: Transport) -> Transferred:
        return await resuming(lambda: put(transport, tmp_path / "source", str(tmp_path / "there"), progress=kill))

    sent = over_ssh(sshd, scenario)
    assert kill.killed
    assert (sent.sha256, 6 * MIB <= sent.resumed < 24 * MIB) == (sha256, True)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_host_that_is_gone_for_good_is_given_up_at_last(
    sshd: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatch.transfer.PATIENCE_SECONDS", 0.5)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        host = dataclasses.replace(sshd.host, python=sys.executable, port=nobody.getsockname()[1])
        transport, said = SSHTransport(host, sshd.environ), list[str]()
        with pytest.raises(TransportError):
            asyncio.run(resuming(lambda: get(transport, "/etc/hostname", tmp_path / "here"), say=said.append))
    assert len(said) > 1
    assert not list(tmp_path.iterdir())


# What goes wrong for good


def test_another_hash_than_the_manifest_has_is_an_error_and_leaves_nothing(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "source", MIB)
    for scenario in (
        lambda transport: get(transport, str(tmp_path / "source"), tmp_path / "x" / "here", sha256="0" * 64),
        lambda transport: put(transport, tmp_path / "source", str(tmp_path / "x" / "there"), sha256="0" * 64),
    ):
        with pytest.raises(RunError):
            use(scenario)
    assert [each.name for each in (tmp_path / "x").iterdir()] in ([], ["there.part"])


def test_another_size_than_expected_is_an_error(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "source", 1000)
    wanted, found = str(tmp_path / "source"), tmp_path / "here"
    with pytest.raises(RunError, match="has 1,000 bytes; expected 999"):
        use(lambda transport: get(transport, wanted, found, size=999))
    with pytest.raises(RunError, match="1,000 bytes are there, expected 1,001"):
        use(lambda transport: get(transport, wanted, found, size=1001))
    assert not (tmp_path / "here").exists()


def test_of_a_file_that_grew_since_its_manifest_the_beginning_is_taken(use: Use, tmp_path: Path) -> None:
    sha256 = make(tmp_path / "log", 1000)
    with (tmp_path / "log").open("ab") as log:
        log.write(b"more")
    use(lambda transport: get(transport, str(tmp_path / "log"), tmp_path / "here", sha256=sha256, size=1000))
    assert hashlib.sha256((tmp_path / "here").read_bytes()).hexdigest() == sha256


@pytest.mark.usefixtures("step_by_step")
def test_a_file_that_is_changed_while_it_is_fetched_is_noticed(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "source", 24 * MIB)

    def touch(progress: Progress) -> None:
        os.utime(tmp_path / "source")

    with pytest.raises(TransferError, match="was changed while it was fetched"):
        use(lambda transport: get(transport, str(tmp_path / "source"), tmp_path / "here", progress=touch))
    assert not (tmp_path / "here").exists()


@pytest.mark.usefixtures("step_by_step")
def test_a_file_that_is_changed_while_it_is_sent_is_noticed(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "source", 24 * MIB)

    def touch(progress: Progress) -> None:
        if 0 < progress.done < 24 * MIB:
            os.utime(tmp_path / "source")

    with pytest.raises(TransferError, match="was changed while it was sent"):
        use(lambda transport: put(transport, tmp_path / "source", str(tmp_path / "there"), progress=touch))
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("where", ["missing", "directory", "symbolic link", "pipe"])
def test_only_a_regular_file_is_fetched_and_the_reason_is_told(use: Use, tmp_path: Path, where: str) -> None:
    make(tmp_path / "real", 10)
    source = tmp_path / "source"
    if where == "directory":
        source.mkdir()
    elif where == "symbolic link":
        source.symlink_to("real")
    elif where == "pipe":
        os.mkfifo(source)
    with pytest.raises(HostToolError, match=r"source: (No such file|not a regular|Too many levels|Is a directory)"):
        use(lambda transport: get(transport, str(source), tmp_path / "here" / "file"))
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.usefixtures("step_by_step")
def test_a_full_disk_is_one_clear_message_and_what_came_is_kept(use: Use, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=24m tmpfs {small} 2>/dev/null") != 0:
        pytest.skip("no mount here")
    try:
        sha256 = make(tmp_path / "source", 20 * MIB)
        make(small / "other", 10 * MIB, 1)
        for scenario in (
            lambda transport: get(transport, str(tmp_path / "source"), small / "here"),
            lambda transport: put(transport, tmp_path / "source", str(small / "there")),
        ):
            with pytest.raises(RunError, match=r"the disk is full: 20,971,520 bytes are to come, [\d,]+ are free"):
                use(scenario)

        # Somebody else takes the space once half of it is there.
        (small / "other").unlink()

        def fill(progress: Progress) -> None:
            if progress.done >= 2 * MIB and not (small / "other").exists():
                with contextlib.suppress(OSError):
                    make(small / "other", 20 * MIB, 1)

        for name, scenario in {
            "here": lambda transport: get(transport, str(tmp_path / "source"), small / "here", progress=fill),
            "there": lambda transport: put(transport, tmp_path / "source", str(small / "there"), progress=fill),
        }.items():
            with pytest.raises(RunError, match=f"{name}.*No space left on device"):
                use(scenario)
            (small / "other").unlink()
            assert (small / f"{name}.part").stat().st_size >= 2 * MIB
            done = use(
                {
                    "here": lambda transport: get(transport, str(tmp_path / "source"), small / "here"),
                    "there": lambda transport: put(transport, tmp_path / "source", str(small / "there")),
                }[name]
            )
            assert isinstance(done, Transferred)
            assert (done.resumed >= 2 * MIB, done.sha256) == (True, sha256)
            (small / name).unlink()
    finally:
        os.system(f"umount {small}")


def test_a_directory_that_cannot_be_made_is_one_clear_message(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "file", 10)
    for scenario in (
        lambda transport: get(transport, str(tmp_path / "file"), tmp_path / "file" / "here"),
        lambda transport: put(transport, tmp_path / "file", str(tmp_path / "file" / "there")),
    ):
        with pytest.raises(RunError, match=r"File exists|Not a directory"):
            use(scenario)


def test_a_python_that_is_not_there_is_told(use: Use, tmp_path: Path) -> None:
    with pytest.raises((HostToolError, TransportError), match="/no/such/python"):
        use(lambda transport: get(transport, "/etc/hostname", tmp_path / "here", python="/no/such/python"))


# Two at once


@pytest.mark.parametrize("known", [True, False])
def test_a_second_sender_waits_and_both_succeed(use: Use, tmp_path: Path, known: bool) -> None:
    sha256 = make(tmp_path / "source", 24 * MIB)

    async def scenario(transport: Transport) -> None:
        target = str(tmp_path / "there")
        expected = sha256 if known else None
        sent = await asyncio.gather(*(put(transport, tmp_path / "source", target, sha256=expected) for _ in range(3)))
        assert sorted(each.resumed for each in sent) == ([0, 24 * MIB, 24 * MIB] if known else [0, 0, 0])

    use(scenario)
    assert hashlib.sha256((tmp_path / "there").read_bytes()).hexdigest() == sha256
    assert not (tmp_path / "there.part").exists()


def test_a_second_fetch_of_the_same_file_is_refused(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "source", 24 * MIB)

    async def scenario(transport: Transport) -> list[object]:
        fetch = (get(transport, str(tmp_path / "source"), tmp_path / "here") for _ in range(2))
        return list(await asyncio.gather(*fetch, return_exceptions=True))

    results = use(scenario)
    assert isinstance(results, list)
    (refused,) = [each for each in results if not isinstance(each, Transferred)]
    assert "is being fetched by another process" in str(refused)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "source").read_bytes()


# Directories


def test_a_directory_is_fetched_without_what_is_no_regular_file(use: Use, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    sums = {name: make(there / name, size, size) for name, size in {"a": 0, "b/c": 10, "b/d/e": 3 * MIB}.items()}
    make(there / "unwanted", 10)
    make(tmp_path / "secret", 10)
    (there / "link").symlink_to(tmp_path / "secret")
    (there / "below").symlink_to(tmp_path)
    os.mkfifo(there / "pipe")
    (there / "bad\x1b[2Jname").write_text("x")
    Path(os.fsdecode(os.fsencode(there) + b"/bad\xff")).write_text("x")
    (there / "B").mkdir()
    (there / "B" / "C").write_text("x")
    (there / "half.part").write_text("x")
    with socket.socket(socket.AF_UNIX) as unix:
        cwd = Path.cwd()
        os.chdir(there)
        unix.bind("socket")
        os.chdir(cwd)
        fetch = lambda transport: get_tree(transport, str(there), here, want=lambda name: name != "unwanted")  # noqa: E731
        first, second = use(fetch), use(fetch)
    for found, resumed in ((first, [0, 0, 0]), (second, [0, 10, 3 * MIB])):
        folded = {name.lower(): each for name, each in found.files.items()}  # type: ignore[attr-defined]
        assert {name for name in folded} == set(sums)
        assert folded["b/d/e"].sha256 == sums["b/d/e"]
        assert {each.name: each.reason.split()[0] for each in found.left_out} == {  # type: ignore[attr-defined]
            "link": "symbolic",
            "below": "symbolic",
            "pipe": "pipe",
            "socket": "socket",
            "bad\\x1b[2Jname": "control",
            "bad\\udcff": "control",
            "b/c": "differs",
            "half.part": "a",
        }
        assert folded["b/d/e"].resumed == resumed[2]
    assert sorted(each.name for each in here.rglob("*") if each.is_file()) == ["C", "a", "e"]
    assert (here / "b" / "d" / "e").read_bytes() == (there / "b" / "d" / "e").read_bytes()


@pytest.mark.usefixtures("step_by_step")
def test_a_fetched_directory_goes_on_after_a_killed_connection(sshd: Rig, tmp_path: Path) -> None:
    there = tmp_path / "there"
    sums = {f"f{index}": make(there / f"f{index}", 4 * MIB, index) for index in range(4)}
    kill = KillOnce(sshd, 6 * MIB)
    found = over_ssh(
        sshd,
        lambda transport: resuming(
            lambda: get_tree(transport, str(there), tmp_path / "here", sums=sums, progress=kill)
        ),
    )
    assert kill.killed
    assert {name: each.sha256 for name, each in found.files.items()} == sums
    assert found.files["f0"].resumed == 4 * MIB
    assert found.files["f3"].resumed == 0
    assert all((tmp_path / "here" / name).read_bytes() == (there / name).read_bytes() for name in sums)


def test_a_file_that_its_manifest_knows_otherwise_is_an_error(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "there" / "f", 10)
    with pytest.raises(TransferError, match=r"f: has SHA-256 .*; expected 0000"):
        use(lambda transport: get_tree(transport, str(tmp_path / "there"), tmp_path / "here", sums={"f": "0" * 64}))
    assert not (tmp_path / "here" / "f").exists()


def test_a_directory_that_is_a_link_here_is_not_written_through(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "there" / "d" / "f", 10)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "d").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TransferError, match=r"Not a directory|symbolic"):
        use(lambda transport: get_tree(transport, str(tmp_path / "there"), tmp_path / "here"))
    assert not list((tmp_path / "elsewhere").iterdir())


# Names


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "a/..", ".", "", "a//b", "a/", "nul\0"])
def test_a_host_that_names_a_file_outside_is_refused_as_a_whole(name: str) -> None:
    with pytest.raises(HostToolError, match="nothing was fetched"):
        check_names({"files": [["good", 1, 0], [name, 1, 0]], "others": []}, "gx10")


@given(st.text(max_size=300))
def test_no_name_that_is_taken_leaves_its_directory_or_steers_a_terminal(name: str) -> None:
    try:
        taken = problem(name) is None
    except ValueError:
        return
    if taken:
        root = Path("/root/of/all")
        assert Path(os.path.normpath(root / name)).is_relative_to(root)
        assert os.path.normpath(root / name) == str(root / name)
        assert not any(ord(each) < 32 or 127 <= ord(each) < 160 for each in name)
        name.encode()


@pytest.mark.parametrize(
    "listing",
    [
        {},
        {"files": 3, "others": []},
        {"files": [["a", -1, 0]], "others": []},
        {"files": [["a", "b", "c"]], "others": []},
        {"files": [3], "others": []},
    ],
)
def test_an_answer_that_is_no_listing_is_refused(listing: dict[str, object]) -> None:
    with pytest.raises(HostToolError, match="no listing"):
        check_names(listing, "gx10")


LIARS = {
    "another name": ('say(name="other", size=3, there=3, **{"from": 0}); out(b"abc")', "another file"),
    "a negative size": ('say(name="f", size=-1, there=3, **{"from": 0})', "another file or size"),
    "a start past what we have": ('say(name="f", size=9, there=9, **{"from": 5})', "another file"),
    "no JSON": ('out(b"hello there\\n")', "no JSON"),
    "no object": ('out(b"[1]\\n")', "no JSON object"),
    "an end in the middle": ('say(name="f", size=9, there=9, **{"from": 0}); out(b"abc")', "ended in the middle"),
    "a traceback": ('sys.exit("Boom\\x1b[2J")', r"Boom\\x1b\[2J"),
    "an error that steers a terminal": ('say(error="\\x1b[2J")', r"\\x1b\[2J"),
}


@pytest.mark.parametrize("lie", LIARS)
def test_a_host_that_answers_nonsense_gets_one_clean_message(
    lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, message = LIARS[lie]
    liar = (
        "import json, os, sys\n"
        "def out(data): os.write(1, data)\n"
        "def say(**fields): out((json.dumps(fields) + '\\n').encode())\n" + script
    )
    monkeypatch.setattr(tool_client, "source", lambda: liar)
    with pytest.raises((HostToolError, TransportError), match=message):
        asyncio.run(get(LocalTransport(), "/x/f", tmp_path / "here"))
    assert not (tmp_path / "here").exists()


# Progress


def test_progress_tells_bytes_rate_and_the_seconds_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = [100.0], list[Progress]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter(1000, told.append)
    for done in (100, 150, 300, 1000):
        meter.at(done)
        clock[0] += 1.0
    assert told == [
        Progress(100, 1000, 0.0, None),
        Progress(150, 1000, 50.0, 17.0),
        Progress(300, 1000, 100.0, 7.0),
        Progress(1000, 1000, 300.0, 0.0),
    ]


def test_progress_is_not_told_at_every_byte_but_at_the_end(use: Use, tmp_path: Path) -> None:
    make(tmp_path / "source", 8 * MIB)
    told = list[Progress]()
    use(lambda transport: put(transport, tmp_path / "source", str(tmp_path / "there"), progress=told.append))
    assert told[-1] == dataclasses.replace(told[-1], done=8 * MIB, total=8 * MIB, eta=0.0)
    assert [each.done for each in told] == sorted(each.done for each in told)
    assert len(told) < 20


def test_what_is_in_flight_is_bounded(sshd: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A disk that writes nothing for a while: the host must be held up, not our memory filled.
    monkeypatch.setattr("dispatch.ssh_stream.WINDOW", 4 * MIB)
    make(tmp_path / "source", 64 * MIB)
    gate, arrived = threading.Event(), list[int]()
    real = host_tool.Writer.write

    def slow(self: host_tool.Writer, data: bytes) -> None:
        if arrived:
            gate.wait(20)
        arrived.append(len(data))
        real(self, data)

    async def scenario(transport: SSHTransport) -> Transferred:
        fetching = asyncio.create_task(get(transport, str(tmp_path / "source"), tmp_path / "here"))
        while not arrived:
            await asyncio.sleep(0.01)
        start, before, still = _resident(), -1, 0
        while still < 20:
            await asyncio.sleep(0.02)
            still = still + 1 if _resident() == before else 0
            before = _resident()
        gate.set()
        assert before - start < 24 * MIB
        return await fetching

    monkeypatch.setattr(host_tool.Writer, "write", slow)
    assert over_ssh(sshd, scenario).size == 64 * MIB


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_the_tool_says_what_it_was_asked_in_vain() -> None:
    async def scenario() -> None:
        for request, message in (({"op": "nothing"}, "no such operation"), ({"op": "tree"}, "cannot be read")):
            with pytest.raises(HostToolError, match=message):
                async with tool_client.conversation(LocalTransport(), request) as talk:
                    await talk.answer()

    asyncio.run(scenario())
