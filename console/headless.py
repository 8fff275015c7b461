"""Runs without a screen: launch, follow, judge again, report, exit code. What the dashboard does, without drawing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from console.narration import Narrator
from console.report import Result
from console.run_state import Reducer, RunState
from dispatch import runs
from dispatch.follower import Batch, Follower
from dispatch.manifest import SUMS, verify_sums
from dispatch.supervisor import write_atomic
from dispatch.transport import LocalTransport, Transport
from engine.config import RunConfig, load_config
from engine.errors import ConfigError, DataError, ExitCode, KdError, RunError
from engine.falsifiers import builtin_contract, exit_code_of, parse_contract
from engine.formats import inspect_model_dir, resolve_builtin
from engine.text import clean
from engine.vocabulary import check_vocabulary

SILENCE_SECONDS = 60.0
"""A run that sends not even a heartbeat for this long is stalled."""
STOP_GRACE_SECONDS = 30.0
MAX_CONTRACT_BYTES = 1 << 20
BUILTIN_CORPUS = "builtin:stdlib"
RESUME = "resume.json"


@dataclass(frozen=True)
class Job:
    """One run to make: what, where, and whether Ctrl-C stops it or lets it go on."""

    config: RunConfig
    evidence: Path
    name: str | None = None
    overrides: tuple[str, ...] = ()
    """What the operator forced, by name; it stands in the manifest."""

    @property
    def stops_on_interrupt(self) -> bool:
        """A smoke is waited for and dies with the wait; a long run is only watched."""
        return self.config.mode == "smoke"


def check(config: RunConfig) -> str:
    """Everything that can be refused before a process is started; returns the contract's text.

    Raises:
        ConfigError, ModelError, DataError: what is wrong, in one message.
    """
    text = contract_text(config)
    parse_contract(text, config.contract.path)
    wanted = config.student
    student = inspect_model_dir(resolve_builtin(wanted.source), "student", need_weights=not wanted.starts_random)
    if config.teacher is not None:
        teacher = inspect_model_dir(resolve_builtin(config.teacher.path), "teacher")
        check_vocabulary(teacher.vocab_size, student.vocab_size, teacher.tokenizer_dir, student.tokenizer_dir)
    _check_corpus(config.data.paths)
    tokenizer = config.data.tokenizer
    if tokenizer is not None and tokenizer != "builtin" and not (Path(tokenizer) / "tokenizer.json").is_file():
        shown = clean(tokenizer, 300)
        raise DataError(
            f"data.tokenizer: {shown} has no tokenizer.json", expected="a directory that has one, or builtin"
        )
    return text


def _check_corpus(paths: Sequence[str]) -> None:
    """What can be told of the corpus without tokenising it; the engine looks again, and at the rest."""
    for given in paths:
        path, shown = Path(given), clean(given, 300)
        if given == BUILTIN_CORPUS or path.is_dir():
            continue
        if not path.exists():
            raise DataError(f"data.path: {shown}: no such file or directory", do="check the path")
        try:
            empty = path.is_file() and not _first_byte(path)
        except OSError as error:
            raise DataError(
                f"data.path: {shown}: cannot be read: {error.strerror}", do="check its permissions"
            ) from None
        if empty and len(paths) == 1:
            raise DataError(f"data.path: {shown} is empty", expected="text", do="check the path")


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def contract_text(config: RunConfig) -> str:
    """The YAML of the contract that a configuration names.

    Raises:
        ConfigError: the file cannot be read.
    """
    if config.contract.path == "builtin":
        return builtin_contract(config.mode)
    path = Path(config.contract.path)
    try:
        if path.stat().st_size > MAX_CONTRACT_BYTES:
            raise ConfigError(
                f"contract {path}: {path.stat().st_size:,} bytes", expected=f"at most {MAX_CONTRACT_BYTES:,}"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"contract {path}: {error.strerror}", expected="a YAML file or builtin") from None
    except UnicodeDecodeError:
        raise ConfigError(f"contract {path}: not UTF-8", expected="a YAML file") from None


def run(job: Job, narrator: Narrator) -> Result | None:
    """Makes a run and follows it to its end; None when the operator let go of one that goes on."""
    text = check(job.config)
    return asyncio.run(_run(job, text, narrator))


def resume(run_dir: runs.RunDir, allow_changed: Sequence[str], narrator: Narrator) -> Result | None:
    """Another attempt of a run that ended before its last step, from its newest whole checkpoint.

    Raises:
        RunError: it is no full run, it still runs, or it is complete.
    """
    return asyncio.run(_resume(run_dir, allow_changed, narrator))


def attach(run_dir: runs.RunDir, narrator: Narrator) -> Result | None:
    """Follows a run that exists, running or ended, to its end."""
    return asyncio.run(_attach(run_dir, narrator))


async def _run(job: Job, text: str, narrator: Narrator) -> Result | None:
    started = time.monotonic()
    run_dir = runs.create_run(
        job.config, evidence=job.evidence, contract_text=text, name=job.name, overrides=job.overrides
    )
    narrator.say(f"run {run_dir.id} in {run_dir.path}")
    transport = LocalTransport()
    budget = job.config.smoke.budget_seconds if job.config.mode == "smoke" else None
    # From before the launch on, so that no Ctrl-C ends the console and leaves behind a run that it has just started.
    with _interrupts() as interrupt:
        await runs.launch(transport, run_dir.path)
        launch_seconds = time.monotonic() - started
        stops = job.stops_on_interrupt
        return await _follow_run(run_dir, transport, narrator, interrupt, stops, budget, launch_seconds)


async def _resume(run_dir: runs.RunDir, allow_changed: Sequence[str], narrator: Narrator) -> Result | None:
    if run_dir.manifest.mode != "train":
        raise RunError(f"run {run_dir.id}: a {run_dir.manifest.mode}", expected="a training run")
    config = load_config(run_dir.path / "config.yaml")
    check(config)
    started = time.monotonic()
    transport = LocalTransport()
    now = await runs.status(transport, run_dir.path)
    if now.state in ("running", "starting"):
        raise RunError(f"run {run_dir.id}: {now.state}", do=f"kdconsole --headless attach {run_dir.id}")
    if now.exit is not None and now.exit.exit_code == ExitCode.OK:
        raise RunError(f"run {run_dir.id}: complete already", do="start a new run to train further")
    try:
        write_atomic(run_dir.path / RESUME, json.dumps({"allow_changed": list(allow_changed)}).encode())
    except OSError as error:
        raise RunError(f"{run_dir.path}: {error.strerror}", expected="a run directory that can be written") from None
    events = run_dir.path / "events.jsonl"
    past = events.stat().st_size if events.exists() else 0
    with _interrupts() as interrupt:
        await runs.launch(transport, run_dir.path, again=True)
        launched = time.monotonic() - started
        return await _follow_run(run_dir, transport, narrator, interrupt, False, None, launched, past)


async def _attach(run_dir: runs.RunDir, narrator: Narrator) -> Result | None:
    with _interrupts() as interrupt:
        return await _follow_run(run_dir, LocalTransport(), narrator, interrupt, False, None, 0.0)


async def _follow_run(
    run_dir: runs.RunDir,
    transport: Transport,
    narrator: Narrator,
    interrupt: asyncio.Event,
    stops_on_interrupt: bool,
    budget: float | None,
    launch_seconds: float,
    past: int = 0,
) -> Result | None:
    """Follows to the end; what stands in the first `past` bytes of the stream is folded and not told again."""
    contract = parse_contract((run_dir.path / "contract.yaml").read_text(encoding="utf-8"), "contract.yaml")
    reducer = Reducer(contract)
    overdue = None if budget is None else time.monotonic() + budget + SILENCE_SECONDS
    stopping: asyncio.Task[runs.Stop] | None = None
    last: Batch | None = None
    problem: KdError | None = None
    with narrator.watching(run_dir.manifest.mode, budget):
        try:
            async for batch in Follower(transport, run_dir.path, run_dir.run).batches():
                last = batch
                state = reducer.feed(batch.events)
                if batch.offset > past:
                    narrator.show(state, batch)
                if interrupt.is_set():
                    interrupt.clear()
                    if not stops_on_interrupt:
                        narrator.detached(run_dir.id)
                        return None
                    narrator.say("stopping; the run commits what it has. Ctrl-C again ends it at once")
                    again = stopping is not None
                    stopping = asyncio.create_task(_stop(transport, run_dir, kill_after=0 if again else None))
                late = overdue is not None and time.monotonic() > overdue
                if (batch.silent_seconds > SILENCE_SECONDS or late) and problem is None:
                    problem = RunError(
                        f"no end {SILENCE_SECONDS:g} s after the budget"
                        if late
                        else f"nothing heard from the run for {batch.silent_seconds:.0f} s"
                    )
                    narrator.say(f"{problem}; ending it")
                    stopping = asyncio.create_task(_stop(transport, run_dir, kill_after=5.0))
        finally:
            if stopping is not None:
                with contextlib.suppress(KdError):
                    await stopping
    state = reducer.state
    interrupted = stopping is not None and problem is None
    result = _conclude(run_dir, state, last, problem, interrupted, launch_seconds)
    changed = _seal(run_dir, narrator)
    if changed and result.exit_code == ExitCode.OK:
        reason = f"not as it was when the run ended: {', '.join(changed)}"
        result = replace(result, status="CHANGED", reason=reason, exit_code=ExitCode.FAILED)
    return result


def _seal(run_dir: runs.RunDir, narrator: Narrator) -> tuple[str, ...]:
    """Writes the checksums of a run that has none yet; else returns what no longer agrees with those that it has."""
    if not (run_dir.path / SUMS).exists():
        runs.seal(run_dir.path)
        return ()
    problems = verify_sums(run_dir.path)
    for changed in problems:
        narrator.say(f"warning: {run_dir.path}: since the run ended: {changed}")
    return problems


async def _stop(transport: Transport, run_dir: runs.RunDir, kill_after: float | None) -> runs.Stop:
    grace = STOP_GRACE_SECONDS if kill_after is None else kill_after
    return await runs.stop(transport, run_dir.path, grace=grace, kill=True)


def _conclude(
    run_dir: runs.RunDir,
    state: RunState,
    last: Batch | None,
    problem: KdError | None,
    interrupted: bool,
    launch_seconds: float,
) -> Result:
    """Status, reason and exit code, from the `end` event, the exit record and our own judgement."""
    end, record = state.end, last.ended if last else None
    if problem is not None:
        status, reason, code = "TIMEOUT", str(problem), ExitCode.TIMEOUT
    elif end is None:
        how = "its end was not recorded" if record is None else record.describe()
        # A second signal, or one before the engine could listen, ends it without a word; that is no crash.
        stopped = record is not None and (
            record.exit_code == ExitCode.INTERRUPTED or (interrupted and record.signal is not None)
        )
        status, code = ("STOPPED", ExitCode.INTERRUPTED) if stopped else ("CRASHED", ExitCode.UNDECIDED)
        reason = f"the run ended without an end event in phase {state.phase}: {how}; see launch.log"
    else:
        status, reason, code = end.status, end.reason, _known(end.exit_code)
        judged = exit_code_of(state.judged)
        # The engine's word counts only where our own judgement of the same stream says the same.
        concluded = end.status == "COMPLETED" or code == ExitCode.OK
        if state.disagreements or (concluded and judged != code):
            status, reason, code = "DISPUTED", "engine and console judge differently", ExitCode.UNDECIDED
    return Result(
        id=run_dir.id,
        mode=run_dir.manifest.mode,
        state=state,
        exit_code=code,
        status=status,
        reason=reason,
        evidence=run_dir.path,
        launch_seconds=launch_seconds,
    )


def _known(exit_code: int) -> ExitCode:
    """The code as one of ours; what a foreign writer put there is undecided."""
    return ExitCode(exit_code) if exit_code in set(ExitCode) else ExitCode.UNDECIDED


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
