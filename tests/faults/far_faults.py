"""Every fault that comes between a console and its run: done for real, then undone.

Each returns the moment (Unix seconds) from which on nothing was in the way any more; the next event that was written
after it is waited for by whoever asked for the fault. None: the fault has ended the attempt, or waited itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import netns
from consoles import Seat
from far_host import FarHost, insist, until
from far_scene import Scene, end_attempt, kill, kill_connections, settle

from dispatch.getting import get_tree
from dispatch.transfer import resuming
from tests.ssh_proxy import Proxy


def _proxy(scene: Scene) -> Proxy:
    assert scene.host.proxy is not None
    return scene.host.proxy


def _network(scene: Scene) -> netns.Network:
    assert scene.host.network is not None
    return scene.host.network


# The link


async def reset(scene: Scene) -> float | None:
    _proxy(scene).kill()
    return time.time()


async def closed(scene: Scene) -> float | None:
    _proxy(scene).end()
    return time.time()


async def damaged(scene: Scene) -> float | None:
    _proxy(scene).damage()
    return time.time()


async def frozen(scene: Scene) -> float | None:
    _proxy(scene).freeze()
    await scene.wait(0.1, 0.8)
    _proxy(scene).thaw()
    return time.time()


async def half_open(scene: Scene) -> float | None:
    """Nothing comes any more and nobody says so: the console has to find out."""
    _proxy(scene).silence()
    scene.afterwards.append(_proxy(scene).end_silent)
    return time.time()


async def delayed(scene: Scene) -> float | None:
    began = time.time()
    _proxy(scene).delay = scene.chance.uniform(0.02, 0.15)
    await scene.wait(0.3, 0.8)
    _proxy(scene).delay = 0.0
    return began


async def throttled(scene: Scene) -> float | None:
    _proxy(scene).rate = scene.chance.uniform(2e4, 2e5)
    await scene.wait(0.3, 0.8)
    _proxy(scene).rate = None
    return time.time()


async def refused(scene: Scene) -> float | None:
    _proxy(scene).refuse()
    await scene.wait(0.1, 0.8)
    await _proxy(scene).accept()
    return time.time()


async def unplugged(scene: Scene) -> float | None:
    _network(scene).unplug()
    await scene.wait(0.1, 1.5)
    _network(scene).plug()
    return time.time()


async def cut(scene: Scene) -> float | None:
    _network(scene).cut()
    await scene.wait(0.1, 1.5)
    _network(scene).mend()
    return time.time()


async def half_open_cable(scene: Scene) -> float | None:
    """The host forgets the connection while the cable is cut: only a packet of ours brings that to light."""
    _network(scene).cut()
    kill(*scene.host.rig.sessions())
    await scene.wait(0.1, 1.5)
    _network(scene).mend()
    return time.time()


# The host's processes


async def session_killed(scene: Scene) -> float | None:
    kill(*scene.host.rig.sessions())
    return time.time()


async def session_held(scene: Scene) -> float | None:
    held = scene.host.rig.sessions()
    kill(*held, number=signal.SIGSTOP)
    await scene.wait(0.1, 0.8)
    kill(*held, number=signal.SIGCONT)
    return time.time()


async def sshd_killed(scene: Scene) -> float | None:
    """The listener, with its sessions or without them; it comes back after a while."""
    with_sessions = scene.chance.random() < 0.7
    scene.host.rig.end() if with_sessions else scene.host.rig.end_listener()
    await scene.wait(0.0, 0.5)
    await asyncio.to_thread(scene.host.rig.restart)
    return time.time()


async def supervisor_killed(scene: Scene) -> float | None:
    kill(scene.run.pid("supervisor"))
    return time.time()


async def trainer_held(scene: Scene) -> float | None:
    pid = scene.run.pid("trainer")
    kill(pid, number=signal.SIGSTOP)
    await scene.wait(0.1, 0.8)
    kill(pid, number=signal.SIGCONT)
    return time.time()


async def trainer_killed(scene: Scene) -> float | None:
    scene.run.expected = "kill" if scene.run.pid("supervisor") else "lose"
    kill(scene.run.pid("trainer"))
    return None


async def both_killed(scene: Scene) -> float | None:
    scene.run.expected = "lose"
    kill(scene.run.pid("supervisor"), scene.run.pid("trainer"))
    return None


async def pid_reused(scene: Scene) -> float | None:
    """Both are killed and others get their pids: nobody may take those for them, or harm them."""
    run = scene.run
    run.expected = "lose"
    pids = [pid for pid in (run.pid("trainer"), run.pid("supervisor")) if pid is not None]
    kill(*reversed(pids))
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "their pids to be free")
    with contextlib.ExitStack() as stack:
        for pid in pids:
            stack.enter_context(netns.somebody_else(pid))
        place = run.place(scene.control)
        told = await insist(place.status)
        stopped = await insist(lambda: place.stop(grace=0.5, kill=True))
        if told.state != "lost" or stopped.result != "already_ended":
            scene.problems.append(f"took another's process for its own: {told.state}, {stopped.result}")
        await settle(scene)
        await scene.relaunch()
        if not all(Path(f"/proc/{pid}").exists() for pid in pids):
            scene.problems.append("ended a process that only has a pid of the run")
        return time.time()


# Disks


def _fill(where: Path) -> Path:
    """Fills a disk that others write to meanwhile; returns the file that does it."""
    ballast = where / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    return ballast


async def host_full(scene: Scene) -> float | None:
    ballast = await asyncio.to_thread(_fill, scene.host.base)
    await scene.wait(0.1, 0.8)
    ballast.unlink()
    return time.time()


async def console_full(scene: Scene) -> float | None:
    began = time.time()
    ballast = await asyncio.to_thread(_fill, scene.host.evidence)
    await scene.wait(0.1, 0.8)
    ballast.unlink()
    return began


# Consoles


async def console_killed(scene: Scene) -> float | None:
    """A real console is killed, and another one sits down."""
    if not scene.seats:
        scene.seats.append(await Seat.take(scene.run))
    old = scene.seats.pop()
    await old.until_it_follows()
    await scene.wait(0.0, 0.2)
    await old.kill()
    killed = time.time()
    scene.seats.append(await Seat.take(scene.run))
    await scene.seats[-1].until_it_follows()
    scene.took = time.time() - killed
    return None


async def second_console(scene: Scene) -> float | None:
    began = time.time()
    seat = await Seat.take(scene.run)
    await seat.until_it_follows()
    if not seat.alive:
        scene.problems.append(f"a second console ended: {seat.told[-3:]}")
    if len(scene.seats) >= 2 or scene.chance.random() < 0.5:
        code = await seat.interrupt()
        if code != 0 or not any("the run goes on" in line for line in seat.told):
            scene.problems.append(f"a console that was left said {code}: {seat.told[-3:]}")
    else:
        scene.seats.append(seat)
    return began


async def key_changed(scene: Scene) -> float | None:
    """No console may talk to a host of another key, and nothing is said of the run meanwhile."""
    before = scene.eye.refusals
    for seat in scene.seats:
        await seat.until_it_follows()
    await asyncio.to_thread(scene.host.change_key)
    kill_connections(scene)
    await until(lambda: scene.eye.refusals > before, "the changed key to be noticed")
    for seat in scene.seats:
        await seat.end()
        if seat.code != 3 or not any("HAS CHANGED" in line for line in seat.told):
            scene.problems.append(f"a console met a changed key with {seat.code}: {seat.told[-3:]}")
    scene.seats.clear()
    await asyncio.to_thread(scene.host.restore_key)
    return time.time()


# What a console does


async def launched_through_resets(scene: Scene) -> float | None:
    """Another attempt is launched from two consoles at once, while connections are reset: one of them starts it."""
    await end_attempt(scene, "finish")
    other = scene.host.transport()
    rival = scene.run.place(other)
    await insist(rival.status)  # connected before, so that both come in the same instant
    both = asyncio.gather(scene.relaunch(), insist(lambda: rival.launch(gpu=False, again=True)))
    try:
        await scene.while_connections_die(both)
    finally:
        await other.close()
    return time.time()


async def stopped_through_resets(scene: Scene) -> float | None:
    scene.run.expected = "stop"
    place = scene.run.place(scene.control)
    stopped = await scene.while_connections_die(insist(lambda: place.stop(grace=20.0)))
    if stopped.result == "still_running" or scene.run.goes_on:
        scene.problems.append(f"a stop was answered with {stopped.result}, and goes_on is {scene.run.goes_on}")
    return None


async def ended_through_resets(scene: Scene) -> float | None:
    """The run ends, and a real console brings its evidence here, while connections are reset."""
    if not scene.seats:
        scene.seats.append(await Seat.take(scene.run))
    await scene.seats[-1].until_it_follows()
    scene.run.order("finish")
    for _ in range(scene.chance.randint(2, 6)):
        await scene.wait(0.02, 0.25)
        kill_connections(scene)
    return None


async def fetched_through_resets(scene: Scene) -> float | None:
    """Files come here while connections are reset, and are those of the host by their hashes."""
    there, here = scene.run.there / "checkpoints", scene.host.root / "fetched" / f"{scene.chance.getrandbits(48):x}"
    work = resuming(lambda: get_tree(scene.control, str(there), here, want=lambda name: not name.startswith(".")))
    tree = await scene.while_connections_die(work)
    for name in tree.files:
        ours, theirs = (hashlib.sha256((side / name).read_bytes()).hexdigest() for side in (here, there))
        if ours != theirs:
            scene.problems.append(f"{name} was fetched with other contents")
    if not tree.files:
        scene.problems.append("nothing was fetched")
    await asyncio.to_thread(shutil.rmtree, here)
    return time.time()


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    act: Callable[[Scene], Awaitable[float | None]]
    weight: float = 1.0
    way: str = ""
    """`proxy` or `cable`, where only that can do it."""
    kind: str = "link"
    """Two faults of different kinds may come at once."""
    ends: bool = False
    """It ends the attempt."""
    why_not: Callable[[FarHost], str | None] = lambda host: None


def _no_disks(host: FarHost) -> str | None:
    return None if host.disks else "needs root, to mount small disks"


FAULTS = (
    Fault("connection reset", reset, 4, "proxy"),
    Fault("connection closed", closed, 2, "proxy"),
    Fault("one bit flipped on the way", damaged, 2, "proxy"),
    Fault("link frozen for a while", frozen, 2, "proxy"),
    Fault("half-open link", half_open, 1.5, "proxy"),
    Fault("20 to 150 ms later, each way", delayed, 1, "proxy"),
    Fault("20 to 200 kB/s", throttled, 1, "proxy"),
    Fault("host takes no connection for a while", refused, 2, "proxy"),
    Fault("cable out for a while", unplugged, 4, "cable"),
    Fault("packets of the host lost for a while", cut, 4, "cable"),
    Fault("host forgot the connection while the cable was cut", half_open_cable, 4, "cable"),
    Fault("SIGKILL of sshd's session", session_killed, 3),
    Fault("sshd's session stands still for a while", session_held, 1.5),
    Fault("SIGKILL of sshd, started again", sshd_killed, 2),
    Fault("host key changed", key_changed, 0.7),
    Fault("trainer stands still for a while", trainer_held, 1.5, kind="host"),
    Fault("SIGKILL of the trainer", trainer_killed, 1.5, kind="host", ends=True),
    Fault("SIGKILL of the supervisor", supervisor_killed, 1.5, kind="host"),
    Fault("SIGKILL of supervisor and trainer", both_killed, 0.4, kind="host", ends=True),
    Fault(
        "the same, and their pids taken by others", pid_reused, 0.4, kind="alone", why_not=lambda _: netns.why_no_pid()
    ),
    Fault("full disk of the host", host_full, 2, kind="disk", why_not=_no_disks),
    Fault("full disk of the console", console_full, 1, kind="disk", why_not=_no_disks),
    Fault("SIGKILL of a console, another one attached", console_killed, 0.8, kind="alone"),
    Fault("another console at once", second_console, 0.8, kind="alone"),
    Fault("launch through resets, from two consoles at once", launched_through_resets, 1.2, kind="alone"),
    Fault("stop through resets", stopped_through_resets, 0.8, kind="alone", ends=True),
    Fault("end through resets", ended_through_resets, 0.8, kind="alone", ends=True),
    Fault("fetch through resets", fetched_through_resets, 1, kind="alone"),
)
