"""Runs over SSH while connections, processes, disks and hosts fail: each fault alone, many kills, a random schedule."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import asyncssh
import dispatch_soak
import netns
import pytest
from consoles import Eye
from dispatch_soak import FAST, Report, done_one, episode, finished, gone, kills, opened
from far_faults import FAULTS, Fault
from far_host import FarHost, far_host
from far_scene import Scene, settle

from console.watch import Sight, Watcher
from dispatch import follower
from dispatch.ssh import SSHTransport
from dispatch.transport import TransportError
from tests.ssh_rig import MISSING, Rig, running_sshd

pytestmark = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))
RATE = 500.0


@pytest.fixture(scope="module", autouse=True)
def noticed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[float]]]:
    """Seconds in which links that fell silent are noticed with the default keepalives; waited for beside all else."""
    ways = {"proxy": False} | ({"cable": True} if netns.why_not() is None else {})
    with ThreadPoolExecutor(len(ways)) as pool:
        root = tmp_path_factory.mktemp("silent")
        yield {way: pool.submit(asyncio.run, _seconds_to_notice(root / way, cable)) for way, cable in ways.items()}


async def _seconds_to_notice(root: Path, cable: bool) -> float:
    async with far_host(root, cable=cable, disks=False) as host:
        transport = SSHTransport(replace(host.transport().settings), host.rig.environ)
        await transport.stat("/")
        waiting = asyncio.create_task(transport.run(["sleep", "60"], timeout=600))
        await asyncio.sleep(0.5)
        if host.network is not None:
            host.network.cut()
        elif host.proxy is not None:
            host.proxy.silence()
        began = time.monotonic()
        with pytest.raises(TransportError, match=r"not responding to keepalive|connection lost"):
            await waiting
        seconds = time.monotonic() - began
        if host.network is not None:
            host.network.mend()
        assert await transport.stat("/") is not None
        await transport.close()
        return seconds


@pytest.fixture(autouse=True)
def _ask_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "STATUS_SECONDS", dispatch_soak.STATUS_SECONDS)


class Stage:
    """A host and a run on it, for one test after another; a new run where the last one did not survive."""

    def __init__(self, root: Path, cable: bool) -> None:
        self._root, self._cable = root, cable
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self._host: FarHost | None = None
        self._scene: Scene | None = None
        self._chance = random.Random(0)

    def does(self, fault: Fault) -> Scene:
        return self._runner.run(self._does(fault))

    async def _does(self, fault: Fault) -> Scene:
        if self._host is None:
            self._host = await self._stack.enter_async_context(far_host(self._root, cable=self._cable))
        if why := fault.why_not(self._host):
            pytest.skip(why)
        if self._scene is None:
            self._scene = await opened(self._host, self._chance, RATE)
        scene, self._scene = self._scene, None
        await done_one(scene, [(fault, Report().row(fault.name))])
        if fault.ends:
            await settle(scene)
            await scene.relaunch()
        self._scene = scene
        return scene

    def close(self) -> list[str]:
        """Ends the run and returns what is wrong with it."""
        try:
            return self._runner.run(self._close())
        finally:
            self._runner.close()

    async def _close(self) -> list[str]:
        problems: list[str] = []
        if self._scene is not None:
            self._scene.run.order("finish")
            await finished(self._scene, Report())
            await gone(self._scene)
            problems = self._scene.problems
        await self._stack.aclose()
        return problems


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("proxied") / "host", cable=False)
    yield stage
    assert stage.close() == []


@pytest.fixture(scope="module")
def cabled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    if (why := netns.why_not()) is not None:
        pytest.skip(why)
    stage = Stage(tmp_path_factory.mktemp("cabled") / "host", cable=True)
    yield stage
    assert stage.close() == []


def names(cable: bool) -> pytest.MarkDecorator:
    faults = [fault for fault in FAULTS if (fault.way == "cable") == cable]
    return pytest.mark.parametrize("fault", faults, ids=[fault.name for fault in faults])


@names(cable=False)
def test_nothing_is_lost_repeated_or_said_that_is_not_true(proxied: Stage, fault: Fault) -> None:
    check(proxied.does(fault))


@names(cable=True)
def test_nothing_is_lost_or_repeated_when_packets_are(cabled: Stage, fault: Fault) -> None:
    check(cabled.does(fault))


def check(scene: Scene) -> None:
    assert scene.problems + scene.eye.problems == []
    assert (scene.eye.lost, scene.eye.repeated) == (0, 0)


@pytest.mark.timeout(360)
def test_no_event_is_lost_or_repeated_under_20_kills_and_50_000_events_a_second(tmp_path: Path) -> None:
    report = Report()

    async def scenario() -> None:
        async with far_host(tmp_path / "host", disks=False) as host:
            await kills(host, report, 20, random.Random(0), FAST)

    asyncio.run(scenario())
    assert report.ok, report.problems
    assert sum(row.times for row in report.rows.values()) == 20
    assert min(report.rates) > 0.5 * FAST, "the trainer did not write what it was asked to"
    waited = sorted(seconds for row in report.rows.values() for seconds in row.seconds)
    assert waited[10] < 1.5, report.table()  # 0.3 s where nothing else is going on


def test_a_random_schedule_keeps_every_promise(tmp_path: Path) -> None:
    report = Report()

    async def scenario() -> None:
        async with far_host(tmp_path / "host") as host:
            await episode(host, report, 10, random.Random(8))

    asyncio.run(scenario())
    assert report.ok, report.problems
    assert report.runs == 1
    assert sum(row.times for row in report.rows.values()) == 10


# The rig itself: it must notice what it is there to notice


async def watched(host: FarHost) -> list[str]:
    scene = await opened(host, random.Random(0), RATE)
    await asyncio.sleep(0.3)
    scene.run.order("finish")
    with contextlib.suppress(AssertionError):
        await settle(scene)
    seen = [*scene.problems, *(["lost"] * scene.eye.lost), *(["repeated"] * scene.eye.repeated)]
    await gone(scene)
    return seen


@pytest.mark.parametrize("what", ["lost", "repeated"])
def test_a_console_that_loses_or_repeats_an_event_is_found_out(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Watcher.sights

    async def sights(self: Watcher) -> AsyncIterator[Sight]:
        count = 0
        async for sight in real(self):
            batch = sight.batch
            if len(batch.lines) and (count := count + 1) == 3:
                cut = slice(1, None) if what == "lost" else slice(None)
                batch = replace(batch, events=batch.events[cut], lines=batch.lines[cut])
                if what == "repeated":
                    yield sight
            if batch.lines or not sight.batch.lines:
                yield replace(sight, batch=batch)

    monkeypatch.setattr(Watcher, "sights", sights)

    async def scenario() -> list[str]:
        async with far_host(tmp_path / "host", disks=False) as host:
            return await watched(host)

    seen = asyncio.run(scenario())
    assert what in seen
    assert any("saw other bytes than the host has" in problem for problem in seen)


def test_a_false_verdict_and_a_second_trainer_are_found_out(tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        async with far_host(tmp_path / "host", disks=False) as host:
            scene = await opened(host, random.Random(0), RATE)
            scene.run.order("fail")
            scene.run.expected = "finish"
            with (scene.run.there / "starts").open("a") as file:
                file.write("1 TWICE\n")
            await settle(scene)
            await gone(scene)
            return scene.problems

    seen = asyncio.run(scenario())
    assert "concluded FAILED (2) of a run that did finish" in seen
    assert any("two trainers at once" in problem for problem in seen)


def test_what_could_not_be_kept_is_told_with_its_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(scene: Scene) -> float | None:
        scene.problems.append("something was not kept")
        return time.time()

    monkeypatch.setattr(dispatch_soak, "FAULTS", (Fault("a flood", breaks),))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert dispatch_soak.main(["--kills", "0", "--faults", "3"]) == 1
    said = capsys.readouterr()
    assert "| a flood " in said.out
    assert "the schedule was: a flood" in said.err
    assert "something was not kept" in said.err
    [kept] = tmp_path.glob("*/failed/*/host/events.jsonl")
    assert kept.stat().st_size


# A file that grows while it is read


def test_no_zeros_stand_for_what_a_growing_file_did_not_have_yet(tmp_path: Path) -> None:
    """The pieces of one read are asked for at once: a later one may be there when an earlier one was not yet."""
    file = tmp_path / "file"

    class Growing(asyncssh.SFTPServer):
        def read(self, file_obj: object, offset: int, size: int) -> bytes:
            with file.open("rb+") as there:
                there.seek(offset)
                data = there.read(size)
                if offset and not data:
                    there.seek(0)
                    there.write(b"x" * (4 * offset))
            return data

    async def scenario(rig: Rig) -> bytes:
        server = await asyncssh.listen(
            *("127.0.0.1", 0),
            server_host_keys=[str(rig.directory / "host_key")],
            authorized_client_keys=str(rig.directory / "authorized_keys"),
            sftp_factory=Growing,
        )
        port = server.get_port()
        rig.trusted(port)
        transport = SSHTransport(replace(rig.host, port=port), rig.environ)
        sftp = await (await transport.connection()).start_sftp_client()
        async with sftp.open(str(file), "rb") as opened_file:
            piece = opened_file.read_len
        file.write_bytes(b"x" * piece)
        data = await transport.read(str(file), 0, 4 * piece)
        assert file.stat().st_size > piece, "the file has not grown, and nothing was tried"
        await transport.close()
        server.close()
        return data

    file.touch()
    with running_sshd(tmp_path / "host") as rig:
        data = asyncio.run(scenario(rig))
    assert data
    assert set(data) == {ord("x")}


# Links that fall silent; last, so that they need not be waited for


def test_a_silent_link_is_noticed_within_16_seconds(noticed: dict[str, Future[float]]) -> None:
    assert 9 < noticed["proxy"].result() < 16


def test_lost_packets_are_noticed_within_16_seconds(noticed: dict[str, Future[float]]) -> None:
    if (why := netns.why_not()) is not None:
        pytest.skip(why)
    assert 9 < noticed["cable"].result() < 16


def test_an_eye_that_sees_nothing_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with far_host(tmp_path / "host", disks=False) as host:
            eye = Eye(host.make(RATE), keep=False)
            try:
                with pytest.raises(AssertionError, match="no event for"):
                    await eye.next_event(0.0, seconds=0.3)
            finally:
                await eye.close()

    asyncio.run(scenario())


def test_an_attempt_that_dies_before_its_first_event_is_not_called_what_the_one_before_was(tmp_path: Path) -> None:
    async def scenario() -> str:
        async with far_host(tmp_path / "host", disks=False) as host:
            scene = await opened(host, random.Random(0), 500.0)
            scene.run.order("finish")
            await settle(scene)
            place = replace(scene.run.place(scene.control), command=("/bin/false",))
            await place.launch(gpu=False, again=True)
            for name in ("exit.json", "SHA256SUMS"):
                (scene.run.here / name).unlink(missing_ok=True)
            eye = Eye(scene.run, keep=False)
            scene.run.expected = "kill"
            concluded = await eye.end()
            await eye.close()
            await gone(scene)
            assert "exit code 1, before its first event" in concluded.reason
            return f"{concluded.status} {int(concluded.exit_code)}"

    assert asyncio.run(scenario()) == "CRASHED 5"
