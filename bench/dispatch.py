"""What sending and fetching cost, against OpenSSH's own tools, over a real sshd on the loopback interface.

    python bench/dispatch.py [transfer] [distant] [--mib 512] [--repeats 5] [--directory DIR] [--json]

Needs a checkout, the `test` extra, and OpenSSH's server and clients; rsync where it is installed. Without a part named
all are measured. What is compared takes turns, one repeat each, so that a busy machine weighs on all of it alike; the
ratio is that of the medians, theirs to ours: above 1 ours is quicker. All use aes128-gcm and no compression, and each
begins with nothing there. Ours computes SHA-256, and its file and directory are on the disk when it ends; theirs do
neither. Ours uses a connection that stands, as a console has; theirs make theirs anew, which takes `connect` seconds.

transfer: one file of noise, fetched and sent.

distant: the same through a proxy that holds every byte back so that a round trip takes 100 ms, whatever the rate.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dispatch.ssh import SSHTransport
from dispatch.transfer import get, put
from tests.ssh_rig import Rig, running_sshd

ROUND_TRIP = 0.1
Row = dict[str, Any]

PROXY = """
import asyncio, sys
target, delay = int(sys.argv[1]), float(sys.argv[2])

class Pipe(asyncio.Protocol):
    def __init__(self):
        self.other, self.early = None, []
    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(1 << 30)
    def data_received(self, data):
        loop.call_later(delay, self.pass_on, data)
    def pass_on(self, data):
        if self.other is None:
            self.early.append(data)
        elif not self.other.transport.is_closing():
            self.other.transport.write(data)
    def connection_lost(self, error):
        loop.call_later(delay, lambda: self.other and self.other.transport.close())

class Near(Pipe):
    def connection_made(self, transport):
        super().connection_made(transport)
        self.task = loop.create_task(self.connect())
    async def connect(self):
        _, far = await loop.create_connection(Pipe, "127.0.0.1", target)
        far.other, self.other = self, far
        for data in self.early:
            self.pass_on(data)

async def main():
    global loop
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Near, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
"""In a process of its own, so that it takes no time from whom it serves."""


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


async def measure(rig: Rig, port: int, directory: Path, mib: int, repeats: int, puts: bool) -> list[Row]:
    """Seconds of all, taking turns."""
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
    tried = {key: each for key, each in tried.items() if puts or key[0] == "get"}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in tried}
    connects = []
    for _ in range(repeats):
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
            }
        )
    rows.append({"way": "connect", "tool": "ssh", "seconds": round(statistics.median(connects), 3)})
    return rows


def distant(rig: Rig, directory: Path, mib: int, repeats: int) -> list[Row]:
    """Fetches over a long way."""
    argv = [sys.executable, "-c", PROXY, str(rig.port), str(ROUND_TRIP / 2)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        try:
            port = int(proxy.stdout.readline())
            public = (rig.directory / "host_key.pub").read_text()
            with (rig.hosts_file.parent / "known_hosts").open("a") as file:
                file.write(f"[127.0.0.1]:{port} {public}")
            return asyncio.run(measure(rig, port, directory, mib, repeats, puts=False))
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
    parser.add_argument("parts", nargs="*", choices=["transfer", "distant", []], help="what to measure")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk to measure with")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    parts = given.parts or ["transfer", "distant"]
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "ssh": subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.strip(),
    }
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch, running_sshd(Path(scratch) / "sshd") as rig:
        rig.trusted()
        for part in parts:
            if part == "transfer":
                results[part] = asyncio.run(measure(rig, rig.port, Path(scratch), given.mib, given.repeats, puts=True))
            else:
                results[part] = distant(rig, Path(scratch), given.mib, given.repeats)
    about["load afterwards"] = f"{os.getloadavg()[0]:.1f}"
    if given.json:
        print(json.dumps({"about": about, **results}))
        return
    print(*(f"{key}: {value}" for key, value in about.items()), "", sep="\n")
    for name, rows in results.items():
        print(shown(name, rows))


if __name__ == "__main__":
    main()
