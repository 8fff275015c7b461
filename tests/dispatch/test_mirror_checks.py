"""The copy of a stream is held against its host before anything is added to it, over a real sshd."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dispatch import mirror as module
from dispatch.mirror import LostTail, MirroredTransport, check_copy
from dispatch.ssh import SSHTransport
from dispatch.supervisor import boot_id
from engine.errors import RunError
from tests.ssh_rig import MISSING, Rig, running_sshd

pytestmark = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))
ID, OTHER = "run-1", "run-2"


def lines(first: int, end: int, run: str = ID, text: str = "x") -> bytes:
    return b"".join(
        json.dumps({"event": "log", "v": 1, "run": run, "seq": seq, "message": text}).encode() + b"\n"
        for seq in range(first, end)
    )


WHOLE = lines(0, 100)
HALF = lines(0, 60)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_sshd(tmp_path_factory.mktemp("host")) as running:
        yield running.trusted()


class Sides:
    """The run's directory there and here, and what a console does with them."""

    def __init__(self, rig: Rig, root: Path) -> None:
        self.rig, self.there, self.here = rig, root / "there", root / "20260102-030405-train"
        self.there.mkdir()
        self.here.mkdir()
        self.said: list[str] = []

    def stand(self, there: bytes, here: bytes, boot: str | None = "before") -> Sides:
        """Writes the streams; `boot` is when the run was started."""
        (self.there / "events.jsonl").write_bytes(there)
        (self.here / "events.jsonl").write_bytes(here)
        start = {"event": "started", "supervisor": {"boot_id": boot_id() if boot is None else boot}}
        (self.there / "supervisor.jsonl").write_text(json.dumps(start) + "\n")
        return self

    @property
    def copy(self) -> bytes:
        return (self.here / "events.jsonl").read_bytes()

    def attach(self, accept: bool = False) -> bytes:
        """All that a console reads."""

        async def read(transport: MirroredTransport) -> bytes:
            data = b""
            while True:
                overlap = 1 if data else 0
                got = (await transport.read(f"{self.there}/events.jsonl", len(data) - overlap, 1 << 20))[overlap:]
                whole = got[: got.rfind(b"\n") + 1]
                if not whole:
                    return data
                data += whole

        async def go() -> bytes:
            ssh = SSHTransport(self.rig.host, self.rig.environ)
            loss = self.said.append if accept else None
            try:
                with MirroredTransport(ssh, str(self.there), self.here, python=sys.executable, loss=loss) as transport:
                    return await read(transport)
            finally:
                await ssh.close()

        return asyncio.run(go())


@pytest.fixture
def sides(rig: Rig, tmp_path: Path) -> Sides:
    return Sides(rig, tmp_path)


def test_a_copy_that_is_a_prefix_goes_on(sides: Sides) -> None:
    assert sides.stand(WHOLE, HALF).attach() == WHOLE
    assert sides.copy == WHOLE


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (lines(0, 10) + lines(10, 100, text="y"), r"events\.jsonl differs from byte [0-9,]+ on .*; expected .* as the"),
        (lines(0, 30), r"has [0-9,]+ bytes; expected [0-9,]+ or more, as the copy has: "),
        (lines(0, 100, run=OTHER), rf"is of run {OTHER}; expected run {ID}, of which the copy is: "),
        (b"", r"has 0 bytes; expected"),
    ],
)
@pytest.mark.parametrize("accept", [False, True])
def test_a_stream_that_is_not_the_one_that_was_copied_is_refused_and_nothing_is_touched(
    sides: Sides, there: bytes, message: str, accept: bool
) -> None:
    sides.stand(there, HALF, boot=None)
    with pytest.raises(RunError, match=message) as caught:
        sides.attach(accept)
    told = str(caught.value)
    assert f"{sides.there}/events.jsonl" in told
    assert str(sides.here / "events.jsonl") in told
    assert "see which of the two is right; if the host's is, move the copy away and attach again" in told
    assert sides.copy == HALF
    assert (sides.there / "events.jsonl").read_bytes() == there


def test_a_stream_that_is_gone_is_refused(sides: Sides) -> None:
    sides.stand(WHOLE, HALF)
    (sides.there / "events.jsonl").unlink()
    with pytest.raises(RunError, match="cannot be read: No such file"):
        sides.attach()
    assert sides.copy == HALF


@pytest.mark.parametrize(
    "there",
    [
        pytest.param(HALF, id="and stopped there"),
        pytest.param(HALF + lines(60, 61)[:9], id="and a line was torn"),
        pytest.param(HALF + lines(60, 80, text="again"), id="and went on without it"),
        pytest.param(HALF + lines(60, 140, text="again"), id="and went on for longer than the copy"),
    ],
)
def test_what_a_reboot_of_the_host_lost_is_named_and_the_operator_is_asked(sides: Sides, there: bytes) -> None:
    sides.stand(there, WHOLE)
    with pytest.raises(LostTail) as caught:
        sides.attach()
    told = str(caught.value)
    assert "gx10 was started anew and lost the end of" in told
    assert "events 60 to 99 are here only" in told
    assert "kdconsole --headless attach 20260102-030405-train --accept-loss" in told
    assert sides.copy == WHOLE, "not touched before the operator said so"

    kept = there[: there.rfind(b"\n") + 1]
    assert sides.attach(accept=True) == kept
    assert sides.copy == kept
    assert (sides.here / "events.jsonl.lost-1").read_bytes() == WHOLE
    assert [each.partition(": ")[2] for each in sides.said] == [
        f"events 60 to 99 are here only, in {sides.here}/events.jsonl.lost-1"
    ]
    sides.stand(lines(0, 20), kept)
    assert sides.attach(accept=True) == lines(0, 20)
    assert (sides.here / "events.jsonl.lost-2").read_bytes() == kept, "what was kept before is kept"


def test_a_host_that_was_away_for_long_is_looked_at_again(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is as long as before and its bytes at the cursor are right; it is not the same."""
    monkeypatch.setattr(module, "REBOOT_SECONDS", 0.0)
    sides.stand(HALF, b"")
    event = f"{sides.there}/events.jsonl"

    async def go() -> None:
        ssh = SSHTransport(sides.rig.host, sides.rig.environ)
        try:
            with MirroredTransport(ssh, str(sides.there), sides.here, python=sys.executable) as transport:
                assert await transport.read(event, 0, 1 << 20) == HALF
                sides.rig.end()
                with pytest.raises(Exception, match="gx10"):
                    await transport.read(event, len(HALF) - 1, 100)
                sides.stand(lines(0, 50) + lines(50, 90, text="z"), HALF)
                sides.rig.restart()
                with pytest.raises(LostTail, match="events 50 to 59 are here only"):
                    await transport.read(event, len(HALF) - 1, 100)
        finally:
            await ssh.close()

    asyncio.run(go())
    assert sides.copy == HALF


def test_a_run_is_not_resumed_on_less_than_is_here(sides: Sides) -> None:
    """What a resume asks before it starts anything on the host."""

    async def go(loss: Callable[[str], object] | None) -> None:
        ssh = SSHTransport(sides.rig.host, sides.rig.environ)
        try:
            await check_copy(ssh, str(sides.there), sides.here, python=sys.executable, loss=loss)
        finally:
            await ssh.close()

    sides.stand(HALF, WHOLE)
    with pytest.raises(LostTail, match="events 60 to 99"):
        asyncio.run(go(None))
    asyncio.run(go(sides.said.append))
    assert sides.copy == HALF
    asyncio.run(go(None))
    with (
        MirroredTransport(SSHTransport(sides.rig.host, sides.rig.environ), str(sides.there), sides.here),
        pytest.raises(RunError, match="another console is following this run"),
    ):
        asyncio.run(go(None))
