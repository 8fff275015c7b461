"""Runs without a screen: launch, follow, judge again, report, exit code. What the dashboard does, without drawing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from console import launch
from console.concerns import supervision
from console.conclusion import Conclusion, conclude
from console.launch import Job
from console.narration import Narrator
from console.report import Result
from console.run_state import RunState
from console.times import age
from console.view import Link
from console.watch import Sight, Watcher
from dispatch import runs
from dispatch.places import Place, Reach
from dispatch.seal import Sealed, seal
from dispatch.transport import TransportError
from engine.errors import ExitCode, KdError, RunError

SILENCE_SECONDS = 60.0
"""A smoke of ours that sends not even a heartbeat for this long, though its host answers, is ended."""
STOP_GRACE_SECONDS = 30.0


def run(job: Job, narrator: Narrator) -> Result | None:
    """Makes a run and follows it to its end; None when the operator let go of one that goes on."""
    return asyncio.run(_run(job, narrator))


def resume(
    run_dir: runs.RunDir,
    allow_changed: Sequence[str],
    narrator: Narrator,
    accept_loss: bool = False,
    devices: int | None = None,
    run_generated_code: bool = False,
) -> Result | None:
    """Another attempt of a run that ended before its last step; see `launch.start_again`.

    Args:
        run_dir: the run.
        allow_changed: what may differ from its beginning.
        narrator: hears how it goes.
        accept_loss: go on where a reboot of its host lost the end of its stream.
        devices: how many train it from here on; None: as many as its configuration says.
        run_generated_code: of an evaluation, the answers to its problems may be run.

    Raises:
        ConfigError: so many devices cannot share its batch, or answers would be run and may not.
        RunError: it is no full run, it still runs, it is complete, or its stream there is not the one that is here.
    """
    return asyncio.run(_resume(run_dir, allow_changed, narrator, accept_loss, devices, run_generated_code))


def attach(run_dir: runs.RunDir, narrator: Narrator, accept_loss: bool = False) -> Result | None:
    """Follows a run that exists, running or ended, to its end; `accept_loss` as in `resume`.

    Raises:
        RunError: its stream on its host is not the one that is here.
    """
    return asyncio.run(_attach(run_dir, narrator, accept_loss))


async def _run(job: Job, narrator: Narrator) -> Result | None:
    started = time.monotonic()
    async with Reach() as reach:
        run_dir = await launch.make(job, reach, narrator.say)
        narrator.say(f"run {run_dir.id} in {run_dir.path}")
        budget = job.config.smoke.budget_seconds if job.config.mode == "smoke" else None
        # From before the launch on, so that no Ctrl-C ends the console and leaves behind a run that it just started.
        with _interrupts() as interrupt, contextlib.closing(reach.place(run_dir, keep=True)) as place:
            await launch.start(place, job.config)
            launch_seconds = time.monotonic() - started
            stops = job.stops_on_interrupt
            return await _follow_run(run_dir, place, narrator, interrupt, stops, budget, launch_seconds)


async def _resume(
    run_dir: runs.RunDir,
    allow_changed: Sequence[str],
    narrator: Narrator,
    accept_loss: bool,
    devices: int | None,
    run_generated_code: bool,
) -> Result | None:
    started = time.monotonic()
    events = run_dir.path / "events.jsonl"
    async with Reach() as reach:
        with _interrupts() as interrupt:
            loss = narrator.say if accept_loss else None
            known = events.stat().st_size if events.exists() else 0
            await launch.start_again(run_dir, allow_changed, reach.place(run_dir), loss, devices, run_generated_code)
            past = min(known, events.stat().st_size if events.exists() else 0)
            launched = time.monotonic() - started
            with contextlib.closing(reach.place(run_dir, keep=True)) as place:
                stops = launch.waited_for(run_dir.manifest.mode)
                return await _follow_run(run_dir, place, narrator, interrupt, stops, None, launched, past)


async def _attach(run_dir: runs.RunDir, narrator: Narrator, accept_loss: bool) -> Result | None:
    async with Reach() as reach:
        with _interrupts() as interrupt:
            loss = narrator.say if accept_loss else None
            with contextlib.closing(reach.place(run_dir, keep=True, loss=loss)) as place:
                return await _follow_run(run_dir, place, narrator, interrupt, False, None, 0.0)


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
    smoke_of_ours = stops_on_interrupt and run_dir.manifest.mode == "smoke"
    overdue = None if budget is None else time.monotonic() + budget + SILENCE_SECONDS
    stopping: asyncio.Task[runs.Stop] | None = None
    last: Sight | None = None
    problem: KdError | None = None
    unreached, trouble = "", _Trouble(narrator)
    with narrator.watching(run_dir.manifest.mode, budget):
        try:
            async for last in watcher.sights():
                batch = last.batch
                if batch.offset > past:
                    narrator.show(last.state, batch)
                if bool(last.link.problem) != bool(unreached):
                    narrator.say(last.link.problem or f"{last.link.host} is reached again")
                unreached = last.link.problem
                trouble.tell(last.link)
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
                # Only a smoke of ours is ended, and only while its host says that nothing comes: what is not reached,
                # or still to be read, is no sign of anything. Of a long run it is told; the rest is its supervisor's.
                silent = batch.silent_seconds > SILENCE_SECONDS or late
                if smoke_of_ours and silent and last.link.live and not batch.lines and problem is None:
                    problem = RunError(
                        f"no end {SILENCE_SECONDS:g} s after the budget"
                        if late
                        else f"nothing heard from the run for {batch.silent_seconds:.0f} s"
                    )
                    narrator.say(f"{problem}; ending it")
                    stopping = asyncio.create_task(_stop(place, kill_after=5.0))
        finally:
            if stopping is not None:
                try:
                    narrator.say((await stopping).describe())
                except KdError as error:
                    narrator.say(f"the stop could not be seen through: {error}")
    state = last.state if last else RunState()
    interrupted = stopping is not None and problem is None
    if interrupted and run_dir.manifest.mode == "evaluate":
        narrator.say(f"what is done is kept; it goes on with: {launch.goes_on_with(run_dir)}")
    sealed = await _seal(run_dir, place, narrator, interrupt)
    place.close()
    changed = sealed.problems if sealed is not None and not sealed.new else ()
    if problem is not None:
        concluded = Conclusion("TIMEOUT", str(problem), ExitCode.TIMEOUT)
    else:
        link = last.link if last else Link()
        concluded = conclude(state, link.exit, interrupted, link.rebooted)
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
        evidence_id=None if sealed is None else sealed.evidence_id,
        launch_seconds=launch_seconds,
    )


async def _seal(run_dir: runs.RunDir, place: Place, narrator: Narrator, interrupt: asyncio.Event) -> Sealed | None:
    """Completes the evidence, or holds the files against what it was; None where that cannot be done now.

    Large weights take their time: Ctrl-C leaves them to the next time.
    """
    interrupt.clear()
    sealing, waiting = asyncio.create_task(seal(run_dir, place, narrator.say)), asyncio.create_task(interrupt.wait())
    await asyncio.wait((sealing, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        if not sealing.done():
            sealing.cancel()
        sealed = await sealing
    except (KdError, asyncio.CancelledError) as error:
        why = str(error) or "interrupted"
        narrator.say(f"warning: the evidence is not complete: {why}; later: kdconsole --headless attach {run_dir.id}")
        return None
    since = "not listed" if sealed.new else "since the run ended"
    for problem in sealed.problems:
        narrator.say(f"warning: {run_dir.path}: {since}: {problem}")
    return sealed


class _Trouble:
    """Tells when a run falls silent, stalls or goes on; once each. What is not known is no news."""

    def __init__(self, narrator: Narrator) -> None:
        self._narrator = narrator
        self._told = "ALIVE"
        self._said: set[str] = set()

    def tell(self, link: Link) -> None:
        known = link.liveness
        if known is None or known.state == "UNKNOWN":
            return
        if known.state != self._told:
            if known.state == "SILENT":
                text = (
                    f"nothing heard for {age(known.heartbeat.seconds)} in phase {known.phase}, though the host answers"
                )
            elif known.state == "STALLED":
                waited, allowed = age(known.progress.seconds), age(known.progress.budget)
                text = f"no progress for {waited} in phase {known.phase} (allowed: {allowed}), though the process lives"
            else:
                text = f"it goes on, in phase {known.phase}"
            self._narrator.say(text)
            self._told = known.state
        wrong = supervision(link)
        for each in wrong:
            if each.short.partition(" for ")[0] not in self._said:
                self._narrator.say(each.text)
        self._said = {each.short.partition(" for ")[0] for each in wrong}


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
