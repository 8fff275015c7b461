"""Runs without a screen: launch, follow, judge again, report, exit code. What the dashboard does, without drawing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from console import launch
from console.conclusion import Conclusion, conclude
from console.launch import Job
from console.narration import Narrator
from console.report import Result
from console.run_state import RunState
from console.watch import Sight, Watcher
from dispatch import runs
from dispatch.manifest import SUMS, verify_sums
from dispatch.places import Place, Reach, collect
from dispatch.transport import TransportError
from engine.errors import ExitCode, KdError, RunError

SILENCE_SECONDS = 60.0
"""A run that sends not even a heartbeat for this long is stalled."""
STOP_GRACE_SECONDS = 30.0


def run(job: Job, narrator: Narrator) -> Result | None:
    """Makes a run and follows it to its end; None when the operator let go of one that goes on."""
    return asyncio.run(_run(job, narrator))


def resume(run_dir: runs.RunDir, allow_changed: Sequence[str], narrator: Narrator) -> Result | None:
    """Another attempt of a run that ended before its last step, from its newest whole checkpoint.

    Raises:
        RunError: it is no full run, it still runs, or it is complete.
    """
    return asyncio.run(_resume(run_dir, allow_changed, narrator))


def attach(run_dir: runs.RunDir, narrator: Narrator) -> Result | None:
    """Follows a run that exists, running or ended, to its end."""
    return asyncio.run(_attach(run_dir, narrator))


async def _run(job: Job, narrator: Narrator) -> Result | None:
    started = time.monotonic()
    async with Reach() as reach:
        run_dir = await launch.make(job, reach, narrator.say)
        narrator.say(f"run {run_dir.id} in {run_dir.path}")
        budget = job.config.smoke.budget_seconds if job.config.mode == "smoke" else None
        place = reach.place(run_dir, keep=True)
        # From before the launch on, so that no Ctrl-C ends the console and leaves behind a run that it just started.
        with _interrupts() as interrupt:
            await place.launch(gpu=launch.wants_gpu(job.config))
            launch_seconds = time.monotonic() - started
            stops = job.stops_on_interrupt
            return await _follow_run(run_dir, place, narrator, interrupt, stops, budget, launch_seconds)


async def _resume(run_dir: runs.RunDir, allow_changed: Sequence[str], narrator: Narrator) -> Result | None:
    started = time.monotonic()
    events = run_dir.path / "events.jsonl"
    past = events.stat().st_size if events.exists() else 0
    async with Reach() as reach:
        with _interrupts() as interrupt:
            await launch.start_again(run_dir, allow_changed, reach.place(run_dir))
            place = reach.place(run_dir, keep=True)
            launched = time.monotonic() - started
            return await _follow_run(run_dir, place, narrator, interrupt, False, None, launched, past)


async def _attach(run_dir: runs.RunDir, narrator: Narrator) -> Result | None:
    async with Reach() as reach:
        with _interrupts() as interrupt:
            return await _follow_run(run_dir, reach.place(run_dir, keep=True), narrator, interrupt, False, None, 0.0)


async def _follow_run(
    run_dir: runs.RunDir,
    place: Place,
    narrator: Narrator,
    interrupt: asyncio.Event,
    stops_on_interrupt: bool,
    budget: float | None,
    launch_seconds: float,
    past: int = 0,
) -> Result | None:
    """Follows to the end; what stands in the first `past` bytes of the stream is folded and not told again."""
    watcher = Watcher(run_dir, place)
    overdue = None if budget is None else time.monotonic() + budget + SILENCE_SECONDS
    stopping: asyncio.Task[runs.Stop] | None = None
    last: Sight | None = None
    problem: KdError | None = None
    unreached = ""
    with narrator.watching(run_dir.manifest.mode, budget):
        try:
            async for last in watcher.sights():
                batch = last.batch
                if batch.offset > past:
                    narrator.show(last.state, batch)
                if bool(last.link.problem) != bool(unreached):
                    narrator.say(last.link.problem or f"{last.link.host} is reached again")
                unreached = last.link.problem
                if interrupt.is_set():
                    interrupt.clear()
                    if not stops_on_interrupt:
                        narrator.detached(run_dir.id)
                        return None
                    narrator.say("stopping; the run commits what it has. Ctrl-C again ends it at once")
                    again = stopping is not None
                    stopping = asyncio.create_task(_stop(place, kill_after=0 if again else None))
                late = overdue is not None and time.monotonic() > overdue
                if late and unreached:
                    raise TransportError(
                        unreached, do=f"the run may go on; later: kdconsole --headless attach {run_dir.id}"
                    )
                if (batch.silent_seconds > SILENCE_SECONDS or late) and problem is None:
                    problem = RunError(
                        f"no end {SILENCE_SECONDS:g} s after the budget"
                        if late
                        else f"nothing heard from the run for {batch.silent_seconds:.0f} s"
                    )
                    narrator.say(f"{problem}; ending it")
                    stopping = asyncio.create_task(_stop(place, kill_after=5.0))
        finally:
            if stopping is not None:
                with contextlib.suppress(KdError):
                    await stopping
    state = last.state if last else RunState()
    interrupted = stopping is not None and problem is None
    await collect(place, run_dir)
    place.close()
    changed = _seal(run_dir, narrator)
    if problem is not None:
        concluded = Conclusion("TIMEOUT", str(problem), ExitCode.TIMEOUT)
    else:
        concluded = conclude(state, last.link.exit if last else None, interrupted)
    if changed and concluded.exit_code == ExitCode.OK:
        reason = f"not as it was when the run ended: {', '.join(changed)}"
        concluded = replace(concluded, status="CHANGED", reason=reason, exit_code=ExitCode.FAILED)
    return Result(
        id=run_dir.id,
        mode=run_dir.manifest.mode,
        state=state,
        exit_code=concluded.exit_code,
        status=concluded.status,
        reason=concluded.reason,
        evidence=run_dir.path,
        launch_seconds=launch_seconds,
    )


def _seal(run_dir: runs.RunDir, narrator: Narrator) -> tuple[str, ...]:
    """Writes the checksums of a run that has none yet; else returns what no longer agrees with those that it has."""
    if not (run_dir.path / SUMS).exists():
        runs.seal(run_dir.path)
        return ()
    problems = verify_sums(run_dir.path)
    for changed in problems:
        narrator.say(f"warning: {run_dir.path}: since the run ended: {changed}")
    return problems


async def _stop(place: Place, kill_after: float | None) -> runs.Stop:
    return await place.stop(grace=STOP_GRACE_SECONDS if kill_after is None else kill_after, kill=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[asyncio.Event]:
    """While inside, Ctrl-C and SIGTERM set the event instead of ending the process."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, event.set)
    try:
        yield event
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
