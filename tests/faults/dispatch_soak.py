"""Does to runs over SSH whatever can be done to them, in a random order, and prints what was lost and how long it took.

    python tests/faults/dispatch_soak.py [--kills N] [--faults N] [--seed S] [--json]

`--kills`: so many killed connections under 50,000 events a second. `--faults`: so many random ones, of every kind.

Kept must be: no event is lost or repeated, the copy here equals the host's file, its `seq` has no gap; no attempt is
launched twice; nothing is left running; no verdict but the true one, and none at all while the host cannot be reached;
files that were fetched are equal by hash. Exit code 1: something was not kept; then the schedule up to there is
printed, and the same `--seed` makes it again. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

import netns
from consoles import Eye
from far_faults import FAULTS, Fault
from far_host import SECONDS, FarHost, far_host, until
from far_scene import Scene, settle

from dispatch import follower
from tests.console_rig import processes_of

FAST = 50_000.0
KILLS_A_RUN, FAULTS_A_RUN = 25, 20
RATES = (50.0, 500.0, 2_000.0)
CATCH_UP_SECONDS = 240.0
"""For a console that is behind when the run ends: on a machine that is busy with other things."""
STATUS_SECONDS = 1.0
"""Consoles in this process ask a host that is silent sooner than others whether a run is still there."""
TOGETHER = 0.15
"""Share of faults that come two at once."""
CABLES = 0.15
"""Share of runs whose host is behind a cable that can be cut, in place of a proxy."""


@dataclass
class Row:
    """One kind of fault."""

    fault: str
    times: int = 0
    lost: int = 0
    repeated: int = 0
    seconds: list[float] = field(default_factory=list)
    """To the next event, of each."""

    def quantile(self, share: float) -> float | None:
        if not self.seconds:
            return None
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


@dataclass
class Report:
    """What came of it."""

    rows: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    runs: int = 0
    events: int = 0
    rates: list[float] = field(default_factory=list)
    """Events a second that were really written while connections were killed."""

    def row(self, fault: str) -> Row:
        return self.rows.setdefault(fault, Row(fault))

    @property
    def ok(self) -> bool:
        return not self.problems and not any(row.lost or row.repeated for row in self.rows.values())

    def table(self) -> str:
        """The rows as Markdown, the sum last."""
        head = ("fault", "times", "lost", "repeated", "p50 s", "p95 s", "max s")
        rows = list(self.rows.values())
        every = [seconds for row in rows for seconds in row.seconds]
        times, lost, repeated = (sum(getattr(row, name) for row in rows) for name in ("times", "lost", "repeated"))
        total = Row("all", times, lost, repeated, every)
        cells = [head, *((_cells(row)) for row in (*rows, total))]
        wide = max(len(row[0]) for row in cells)
        lines = [f"| {row[0]:{wide}} | " + " | ".join(f"{cell:>8}" for cell in row[1:]) + " |" for row in cells]
        lines.insert(1, f"|{'-' * (wide + 2)}|" + "|".join(["---------:"] * (len(head) - 1)) + "|")
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    quantiles = (row.quantile(share) for share in (0.5, 0.95, 1.0))
    times = ("–" if each is None else f"{each:.2f}" for each in quantiles)
    return (row.fault, f"{row.times:,}", f"{row.lost}", f"{row.repeated}", *times)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


# Kills


async def kills(host: FarHost, report: Report, count: int, chance: random.Random, rate: float = FAST) -> None:
    """Connections are killed under many events a second: reset on the way, or with their session on the host."""
    assert host.proxy is not None
    rows = (
        report.row(f"connection reset under {rate:,.0f} events/s"),
        report.row("SIGKILL of sshd's session under it"),
    )
    done = 0
    while done < count:
        scene = await opened(host, chance, rate, keep=True)
        began, before = time.monotonic(), scene.run.stream.count(b"\n")
        try:
            for _ in range(min(KILLS_A_RUN, count - done)):
                fault = chance.choice([each for each in FAULTS if each.name in ("connection reset", SESSION)])
                row = rows[fault.name == SESSION]
                await scene.wait(0.0, 0.2)
                loss, lost, repeated = scene.eye.unreached + 1, scene.eye.lost, scene.eye.repeated
                killed = await fault.act(scene)
                assert killed is not None
                row.seconds.append(await scene.eye.next_event(killed, loss))
                row.times += 1
                row.lost += scene.eye.lost - lost
                row.repeated += scene.eye.repeated - repeated
                done += 1
            seconds = time.monotonic() - began
            report.rates.append((scene.run.stream.count(b"\n") - before) / seconds)
            scene.run.order("finish")
            await finished(scene, report, CATCH_UP_SECONDS)
        except AssertionError as error:
            scene.problems.append(f"under {rate:,.0f} events/s: {error}")
        finally:
            await gone(scene)
        report.problems += scene.problems
        if scene.problems:
            return
        tell(f"{done} of {count} kills under {report.rates[-1]:,.0f} events/s")


SESSION = "SIGKILL of sshd's session"


# Random faults


def schedule(host: FarHost, count: int, chance: random.Random) -> Iterator[list[Fault]]:
    """So many faults, some of them two at a time."""
    way = "cable" if host.network is not None else "proxy"
    possible = [fault for fault in FAULTS if fault.way in ("", way) and fault.why_not(host) is None]
    left = count
    while left:
        first = chance.choices(possible, [fault.weight for fault in possible])[0]
        together = [first]
        others = [fault for fault in possible if fault.kind not in (first.kind, "alone")]
        if left > 1 and first.kind != "alone" and others and chance.random() < TOGETHER:
            together.append(chance.choices(others, [fault.weight for fault in others])[0])
        yield together
        left -= len(together)


async def episode(host: FarHost, report: Report, count: int, chance: random.Random) -> None:
    """One run with so many faults, to its end; then everything is checked."""
    scene = await opened(host, chance, chance.choice(RATES))
    told: list[str] = []
    try:
        for faults in schedule(host, count, chance):
            told.append(" + ".join(fault.name for fault in faults))
            await done_one(scene, [(fault, report.row(fault.name)) for fault in faults])
            if any(fault.ends for fault in faults):
                await settle(scene)
                await scene.relaunch()
            if scene.problems:
                break
        if not scene.problems:
            how = chance.choice(["finish", "finish", "fail"])
            told.append(how)
            scene.run.order(how)
            await finished(scene, report)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is a finding, told with its schedule
        scene.problems.append(f"{type(error).__name__}: {error}")
        traceback.print_exc()
    finally:
        await gone(scene)
    if scene.problems:
        report.problems += [f"run {scene.run.run_dir.id}: {problem}" for problem in scene.problems]
        for side, directory in (("host", scene.run.there), ("console", scene.run.here)):  # their disks are taken away
            shutil.copytree(directory, host.root.parent / "failed" / scene.run.run_dir.id / side)
        tell("NOT kept: " + "; ".join(scene.problems))
        tell("the schedule was: " + "; ".join(told))


async def opened(host: FarHost, chance: random.Random, rate: float, keep: bool | None = None) -> Scene:
    """A new run, launched and seen; without `keep` chance decides whether who watches keeps the copy."""
    run = host.make(rate)
    control = host.transport()
    await run.launch(control)
    scene = Scene(host, run, chance, control, Eye(run, chance.random() < 0.5 if keep is None else keep))
    await scene.eye.next_event(0.0)
    return scene


async def done_one(scene: Scene, faults: Sequence[tuple[Fault, Row]]) -> None:
    """Does one fault, or two at once, and waits for the next event."""
    await scene.wait(0.0, 0.3)
    eye, before = scene.eye, (scene.eye.lost, scene.eye.repeated)
    scene.took = None
    moments = await asyncio.gather(*(fault.act(scene) for fault, _ in faults))
    took = scene.took
    if not any(fault.ends for fault, _ in faults):
        since = max((moment for moment in moments if moment is not None), default=None)
        if since is not None:
            took = await scene.eye.next_event(since)
        scene.clean_up()
    if scene.eye is not eye:
        before = (0, 0)
    for _, row in faults:
        row.times += 1
        row.lost += scene.eye.lost - before[0]
        row.repeated += scene.eye.repeated - before[1]
        if took is not None and not any(each.ends for each, _ in faults):
            row.seconds.append(took)


async def finished(scene: Scene, report: Report, seconds: float = SECONDS) -> None:
    """The run comes to its end as it was told; a last console brings it here whole."""
    await settle(scene, seconds)
    run = scene.run
    if len(run.kept) != len(run.stream):
        last = Eye(run, keep=True)
        try:
            await last.end()
        finally:
            await last.close()
        scene.problems += last.problems
    if run.kept != run.stream:
        scene.problems.append(f"the copy has {len(run.kept):,} bytes, the host {len(run.stream):,}")
    report.events += run.stream.count(b"\n")
    report.runs += 1


async def gone(scene: Scene) -> None:
    """Nothing of the run is left: no process, and in the end no file."""
    await scene.eye.close()
    for seat in scene.seats:
        await seat.kill()
    await scene.control.close()
    run = scene.run
    if not scene.problems:
        try:
            await until(lambda: not processes_of(run.there), "every process of the run to end", 15.0)
        except AssertionError:
            scene.problems.append(f"left behind: {processes_of(run.there)}")
    if not scene.problems:
        for directory in (run.there, run.here):
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


async def soak(root: Path, kill_count: int, fault_count: int, seed: int) -> Report:
    """All of it, from one seed."""
    report = Report()
    if kill_count:
        async with far_host(root / "fast", disks=False) as host:
            await kills(host, report, kill_count, random.Random(seed))
    number, left = 0, fault_count
    while left:
        chance = random.Random(f"{seed}/{number}")
        cable = chance.random() < CABLES and netns.why_not() is None
        async with far_host(root / f"{number}", cable=cable) as host:
            report.left_out |= {f.name: why for f in FAULTS if (why := f.why_not(host)) is not None}
            count = min(FAULTS_A_RUN, left)
            began = time.monotonic()
            await episode(host, report, count, chance)
        number, left = number + 1, left - count
        tell(f"{fault_count - left} of {fault_count} faults; the last {count} in {time.monotonic() - began:.0f} s")
        shutil.rmtree(root / f"{number}", ignore_errors=True)
    if netns.why_not() is not None:
        report.left_out |= {f.name: str(netns.why_not()) for f in FAULTS if f.way == "cable"}
    return report


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of connections under 50,000 events/s (20)")
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="random ones, of every kind (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of everything that is random (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    options = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="kdconsole-ssh-faults-"))
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # nothing of it is left behind then
    follower.STATUS_SECONDS = STATUS_SECONDS
    report = asyncio.run(soak(root, options.kills, options.faults, options.seed))
    seconds = time.monotonic() - began
    verdict = "everything was kept" if report.ok else f"NOT everything was kept; see {root}/failed"
    tell(f"{verdict}: {report.runs} runs, {report.events:,} events, {seconds:.0f} s, seed {options.seed}")
    for name, why in report.left_out.items():
        tell(f"left out: {name}: {why}")
    if options.json:
        rows = [
            {"fault": r.fault, "times": r.times, "lost": r.lost, "repeated": r.repeated, "seconds": sorted(r.seconds)}
            for r in report.rows.values()
        ]
        document = {"seed": options.seed, "ok": report.ok, "seconds": seconds, "rows": rows}
        print(json.dumps(document | {"problems": report.problems}, indent=2))
    else:
        print(report.table())
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if report.ok:
        shutil.rmtree(root)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
