"""What dispatch over SSH costs, over a real sshd on the loopback interface.

    python bench/dispatch.py [transfer] [distant] [tail] [preflight] [idle] [--json]

Needs a checkout, the `test` extra, and OpenSSH's server and clients; rsync where it is installed. Without a part named
all are measured, within ten minutes: on a slow machine `transfer` and `distant` take fewer turns. First the machine and
the versions are printed, then a table for each part.

transfer: one file of noise (`--mib`), fetched and sent, against OpenSSH's scp and rsync. What is compared takes turns,
one repeat each, so that a busy machine weighs on all of it alike; the ratio is that of the medians, theirs to ours:
above 1 ours is quicker. All use aes128-gcm and no compression, and each begins with nothing there. Ours computes
SHA-256 on both sides, and its file and directory are on the disk when it ends; theirs do neither. Ours uses a
connection that stands, as a console has; theirs make theirs anew, which takes `connect` seconds.

distant: the same (`--distant-mib`) through a proxy that holds every byte back so that a round trip takes 100 ms,
whatever the rate.

tail: a process on the host writes steps at a rate for `--seconds`; a follower with its copy here, as consoles have,
reads and decodes them. Lag is from a step's write to its arrival, by one clock. It keeps up when half of the last
second's steps are less than a second late; `read` is what it managed, the time to catch up included.

preflight: the real command, its process included; beside it OpenSSH's `ssh HOST true`, which only connects.

idle: a real `kdconsole --headless attach` on a run that writes a heartbeat every five seconds and nothing else, over
`--idle-seconds`: memory, its own (PSS) and with what it shares (RSS), and CPU as percent of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dispatch_proxy
import dispatch_runs

from dispatch.getting import get
from dispatch.putting import put
from dispatch.ssh import SSHTransport
from tests.ssh_rig import Rig, running_sshd

ROUND_TRIP = 0.1
RATES = (10_000, 100_000)
PARTS = ("transfer", "distant", "tail", "preflight", "idle")
Row = dict[str, Any]


class Tools:
    """OpenSSH's programs, for one port of the rig."""

    def __init__(self, rig: Rig, port: int) -> None:
        self._options = [
            *("-q", "-i", str(rig.identity), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "Ciphers=aes128-gcm@openssh.com", "-o", "Compression=no", "-F", "none"),
        ]
        self._port = str(port)

    def scp(self, source: str, target: str) -> None:
        """One copy."""
        subprocess.run(["scp", "-P", self._port, *self._options, source, target], check=True)

    def rsync(self, source: str, target: str) -> None:
        """One copy."""
        shell = " ".join(["ssh", "-p", self._port, *self._options])
        subprocess.run(["rsync", "--whole-file", "-e", shell, source, target], check=True)

    def connect(self) -> None:
        """Nothing but the connection."""
        subprocess.run(["ssh", "-p", self._port, *self._options, "127.0.0.1", "true"], check=True)


async def measure(rig: Rig, port: int, directory: Path, mib: int, repeats: int, enough: float) -> list[Row]:
    """Seconds of all, taking turns, the last of which begins before `enough` seconds are over."""
    source, target = directory / "source", directory / "target"
    noise = os.urandom(1 << 20)
    with source.open("wb") as file:
        for index in range(mib):
            file.write(index.to_bytes(8, "big") + noise[8:])
    os.sync()
    tools = Tools(rig, port)
    host = dataclasses.replace(rig.host, port=port, python=sys.executable)
    transport = SSHTransport(host, rig.environ)
    await transport.stat("/")

    async def ours_get() -> None:
        await get(transport, str(source), target)

    async def ours_put() -> None:
        await put(transport, source, str(target))

    def theirs(tool: Callable[[str, str], None], *paths: str) -> Callable[[], Awaitable[None]]:
        return lambda: asyncio.to_thread(tool, *paths)

    here, there = str(source), f"127.0.0.1:{source}"
    tried: dict[tuple[str, str], Callable[[], Awaitable[None]]] = {
        ("get", "kdconsole"): ours_get,
        ("get", "scp"): theirs(tools.scp, there, str(target)),
        ("put", "kdconsole"): ours_put,
        ("put", "scp"): theirs(tools.scp, here, f"127.0.0.1:{target}"),
    }
    if shutil.which("rsync"):
        tried["get", "rsync"] = theirs(tools.rsync, there, str(target))
        tried["put", "rsync"] = theirs(tools.rsync, here, f"127.0.0.1:{target}")
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in tried}
    connects = list[float]()
    deadline = time.monotonic() + enough
    while len(connects) < repeats and (not connects or time.monotonic() < deadline):
        begin = time.perf_counter()
        await asyncio.to_thread(tools.connect)
        connects.append(time.perf_counter() - begin)
        for key in sorted(tried):
            target.unlink(missing_ok=True)
            os.sync()
            begin = time.perf_counter()
            await tried[key]()
            seconds[key].append(time.perf_counter() - begin)
            if target.stat().st_size != mib << 20:
                raise SystemExit(f"{key}: {target.stat().st_size} bytes arrived")
    await transport.close()
    rows: list[Row] = []
    for (way, tool), each in sorted(seconds.items()):
        median, ours = statistics.median(each), statistics.median(seconds[way, "kdconsole"])
        rows.append(
            {
                "way": way,
                "tool": tool,
                "seconds": round(median, 3),
                "best": round(min(each), 3),
                "MiB/s": round(mib / median),
                "ratio": round(median / ours, 2),
                "ratio of the best": round(min(each) / min(seconds[way, "kdconsole"]), 2),
                "turns": len(each),
            }
        )
    rows.append({"way": "connect", "tool": "ssh", "seconds": round(statistics.median(connects), 3)})
    return rows


def distant(rig: Rig, directory: Path, mib: int, repeats: int, enough: float) -> list[Row]:
    """The same over a long way."""
    argv = [sys.executable, dispatch_proxy.__file__, str(rig.port), str(ROUND_TRIP / 2)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        try:
            port = int(proxy.stdout.readline())
            rig.trusted(port)
            return asyncio.run(measure(rig, port, directory, mib, repeats, enough))
        finally:
            proxy.kill()


def shown(name: str, rows: list[Row]) -> str:
    """A table."""
    columns = list(rows[0])
    lines = [f"## {name}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join([*lines, ""])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help="what to measure")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--distant-mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--distant-repeats", type=int, default=2)
    parser.add_argument("--enough", type=float, default=100.0, metavar="SECONDS", help="after which no turn begins")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each rate is written")
    parser.add_argument("--idle-seconds", type=float, default=30.0)
    parser.add_argument("--directory", type=Path, help="on the disk to measure with")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load before": f"{load:.1f}",
        "python": platform.python_version(),
        "asyncssh": metadata.version("asyncssh"),
        "ssh": subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.strip(),
    }
    results: dict[str, list[Row]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch, running_sshd(Path(scratch) / "sshd") as rig:
        rig.trusted()
        field = dispatch_runs.Field(rig, Path(scratch))
        field.add()
        ways: dict[str, Callable[[], list[Row]]] = {
            "transfer": lambda: asyncio.run(
                measure(rig, rig.port, Path(scratch), given.mib, given.repeats, given.enough)
            ),
            "distant": lambda: distant(rig, Path(scratch), given.distant_mib, given.distant_repeats, given.enough),
            "tail": lambda: [dispatch_runs.tail(field, rate, given.seconds) for rate in RATES],
            "preflight": lambda: dispatch_runs.preflight(field, given.repeats, Tools(rig, rig.port).connect),
            "idle": lambda: dispatch_runs.idle(field, given.idle_seconds),
        }
        for part in given.parts or PARTS:
            print(f"{time.monotonic() - began:.0f} s: {part}", file=sys.stderr)
            results[part] = ways[part]()
    about["load after"] = f"{os.getloadavg()[0]:.1f}"
    if load > 1.0:
        about["beware"] = "other work was running when this began"
    if given.json:
        print(json.dumps({"schema": 1, "about": about, **results}, indent=2))
        return
    print(*(f"{key}: {value}" for key, value in about.items()), "", sep="\n")
    for name, rows in results.items():
        print(shown(name, rows))


if __name__ == "__main__":
    main()
