"""The parts of `bench/dispatch.py` that need runs on a host: the tail, an idle follower, the pre-flight."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dispatch_stream

from dispatch.hosts import add_host
from dispatch.manifest import Remote
from dispatch.places import Place, Reach
from dispatch.runs import RunDir, create_run
from engine.config import load_config
from engine.stream import Step
from tests.ssh_rig import Rig

ROOT = Path(__file__).resolve().parent.parent
CONSOLE = (sys.executable, "-m", "console")
NAME = "gx10"
WAIT_SECONDS = 60.0
Row = dict[str, Any]


@dataclass
class Field:
    """A host that the real commands know, and a directory for what they leave behind."""

    rig: Rig
    directory: Path

    @property
    def evidence(self) -> Path:
        """Run directories of this side."""
        return self.directory / "evidence"

    @property
    def environ(self) -> dict[str, str]:
        """Of commands."""
        return {**self.rig.environ, "PYTHONPATH": str(ROOT)}

    def add(self) -> None:
        """Writes it into hosts.yaml."""
        given = {"address": "127.0.0.1", "port": self.rig.port, "identity": str(self.rig.identity)}
        add_host(NAME, {**given, "python": sys.executable, "run_dir": str(self.directory / "far")}, self.rig.environ)

    @contextlib.asynccontextmanager
    async def run(self, rate: float, seconds: float) -> AsyncIterator[tuple[RunDir, Place]]:
        """A run there under its supervisor, which writes its stream while inside; see `dispatch_stream`."""
        config = load_config(template="builtin", overrides={"mode": "train"})
        remote = Remote(
            host=NAME, run_dir=str(self.directory / "far" / "runs"), python=sys.executable, engine=str(ROOT)
        )
        run_dir = create_run(config, evidence=self.evidence, contract_text=dispatch_stream.CONTRACT, remote=remote)
        there = self.directory / "far" / "runs" / run_dir.id
        shutil.copytree(run_dir.path, there)
        command = (sys.executable, "-P", dispatch_stream.__file__, str(there), str(rate), str(seconds))
        environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        async with Reach(self.rig.environ) as reach:
            seen = reach.place(run_dir, keep=True)
            place = Place(seen.transport, seen.run_dir, seen.python, seen.supervisor, environment, command)
            try:
                await place.launch(gpu=False)
                yield run_dir, place
            finally:
                await place.stop(grace=5.0, kill=True)
                place.close()
                shutil.rmtree(there, ignore_errors=True)
                shutil.rmtree(run_dir.path, ignore_errors=True)


def tail(field: Field, rate: int, seconds: float) -> Row:
    """How far behind the writer's clock each step arrives in the follower, as a console follows, its copy included."""
    return asyncio.run(_tail(field, rate, seconds))


async def _tail(field: Field, rate: int, seconds: float) -> Row:
    lags, stamps = array("d"), array("d")
    async with field.run(rate, seconds) as (run_dir, place):
        spent, began = time.process_time(), time.monotonic()
        async for batch in place.follower(run_dir.run).batches():
            now = time.time()
            steps = [event.t for event in batch.events if isinstance(event, Step)]
            lags.extend([now - t for t in steps])
            stamps.extend(steps)
        spent, took = time.process_time() - spent, time.monotonic() - began
    if not lags:
        raise SystemExit("tail: no step arrived")
    wrote = stamps[-1] - stamps[0]
    late = [lag for lag, t in zip(lags, stamps, strict=True) if t > stamps[-1] - 1.0]
    order = sorted(lags)
    return {
        "wanted events/s": rate,
        "written events/s": round(len(lags) / wrote),
        "p50 ms": round(1e3 * order[len(order) // 2]),
        "p95 ms": round(1e3 * order[len(order) * 95 // 100]),
        "max ms": round(1e3 * order[-1]),
        "last second's p50 ms": round(1e3 * statistics.median(late)),
        "keeps up": "yes" if statistics.median(late) < 1.0 else "no",
        "read events/s": round(len(lags) / (wrote + lags[-1])),
        "CPU %": round(100 * spent / took),
    }


def preflight(field: Field, repeats: int, connect: Callable[[], None]) -> list[Row]:
    """The real command, from its start to its end, and the seconds that it tells of the looking alone."""
    times: dict[str, list[float]] = {"kdconsole preflight": [], "of it looking at the host": [], "ssh HOST true": []}
    command = [*CONSOLE, "preflight", "--host", NAME, "--json", "--evidence", str(field.evidence)]
    for _ in range(repeats):
        begin = time.perf_counter()
        done = subprocess.run(command, env=field.environ, cwd=field.directory, capture_output=True, check=False)
        times["kdconsole preflight"].append(time.perf_counter() - begin)
        try:
            told = json.loads(done.stdout)
        except ValueError:
            raise SystemExit(f"preflight: exit code {done.returncode}: {done.stderr.decode()[-500:]}") from None
        times["of it looking at the host"].append(told["seconds"])
        begin = time.perf_counter()
        connect()
        times["ssh HOST true"].append(time.perf_counter() - begin)
    return [
        {"what": what, "seconds": round(statistics.median(each), 2), "most": round(max(each), 2)}
        for what, each in times.items()
    ]


def idle(field: Field, seconds: float) -> list[Row]:
    """A real `kdconsole --headless attach` on a run that only heartbeats, and what serves it on the host."""
    return asyncio.run(_idle(field, seconds))


async def _idle(field: Field, seconds: float) -> list[Row]:
    async with field.run(0, 0) as (run_dir, place):
        place.close()  # the copy is the attached console's to keep
        before = set(field.rig.sessions())
        command = [*CONSOLE, "--headless", "attach", run_dir.id, "--evidence", str(field.evidence)]
        output = field.directory / "attach.out"
        with output.open("wb") as out:
            console = subprocess.Popen(command, env=field.environ, cwd=field.directory, stdout=out, stderr=out)
        try:
            copy, deadline = run_dir.path / "events.jsonl", time.monotonic() + WAIT_SECONDS
            while not (copy.exists() and copy.stat().st_size and set(field.rig.sessions()) - before):
                if console.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"idle: attach does not follow: {output.read_text()[-500:]}")
                await asyncio.sleep(0.1)
            await asyncio.sleep(dispatch_stream.BEAT_SECONDS)  # what comes once, at the start, is over
            sessions = [pid for pid in field.rig.sessions() if pid not in before]
            sshd = [each for pid in sessions for each in (pid, *_children(pid))]
            cpu, length, begin = [_cpu([console.pid]), _cpu(sshd)], copy.stat().st_size, time.monotonic()
            await asyncio.sleep(seconds)
            took = time.monotonic() - begin
            after = [_cpu([console.pid]), _cpu(sshd)]
            if copy.stat().st_size == length:
                raise SystemExit("idle: no heartbeat arrived")
            return [
                {"what": what, "PSS MiB": _mib(pids, "Pss"), "RSS MiB": _mib(pids, "Rss"), "CPU %": round(used, 2)}
                for what, pids, used in zip(
                    ("kdconsole --headless attach", "its sshd session"),
                    ([console.pid], sshd),
                    [100 * (end - start) / took for start, end in zip(cpu, after, strict=True)],
                    strict=True,
                )
            ]
        finally:
            console.send_signal(signal.SIGINT)  # it detaches
            with contextlib.suppress(subprocess.TimeoutExpired):
                console.wait(10)
            console.kill()
            console.wait()


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, found) for each in (child, *_children(child))]


def _cpu(pids: list[int]) -> float:
    """Seconds that processes have spent, those that they waited for included."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _mib(pids: list[int], name: str) -> float:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{name}:"):
                total += int(line.split()[1])
    return round(total / 1024, 1)
