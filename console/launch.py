"""What comes before a run: its directory and its start, here or on a host, and another attempt of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from console.checks import check, problems_of, require_writable
from dispatch import runs
from dispatch.manifest import Evaluated, Remote
from dispatch.places import Place, Reach
from dispatch.supervisor import read_regular, write_atomic
from engine.config import RunConfig, load_config
from engine.errors import ConfigError, ExitCode, RunError
from engine.problems import PROBLEMS
from engine.resume import RESUME, Resume

if TYPE_CHECKING:
    from dispatch.facts import HostFacts

_MAX_RESUME_BYTES = 1 << 20


@dataclass(frozen=True)
class Job:
    """One run to make: what, where, and whether Ctrl-C stops it or lets it go on."""

    config: RunConfig
    evidence: Path
    name: str | None = None
    host: str | None = None
    """The host that it is to run on, by its name in hosts.yaml; None is this machine."""
    overrides: tuple[str, ...] = ()
    """What the operator forced, by name; it stands in the manifest."""
    force: bool = False
    """Start although the pre-flight of the host says no, as far as that can be forced."""
    no_gate: str | None = None
    """Why it is started without a passed smoke; None: it is not."""
    smoke: str = ""
    """The command that makes the smoke that it may want, for the message; empty where nobody knows it."""
    evaluated: Evaluated | None = None
    """Of an evaluation, the model that it is of."""

    @property
    def stops_on_interrupt(self) -> bool:
        """Whether Ctrl-C stops it; see `waited_for`."""
        return waited_for(self.config.mode)


def waited_for(mode: str) -> bool:
    """Whether a run of this mode is waited for and stops with the wait; a long one is only watched."""
    return mode in ("smoke", "evaluate")


def mode_overrides(mode: str, sets: Sequence[str]) -> dict[str, object]:
    """What is set for a mode, as `load_config` takes it.

    The contract of a configuration is that of its trainings, and a preparation or an evaluation makes none of their
    claims: it has its own one, unless one is set for it.

    Args:
        mode: smoke, train, prepare or evaluate.
        sets: the operator's `KEY=VALUE` texts.
    """
    if mode in ("smoke", "train") or any(
        each.partition("=")[0].strip().partition(".")[0] == "contract" for each in sets
    ):
        return {"mode": mode}
    return {"mode": mode, "contract.path": "builtin"}


def create(job: Job) -> runs.RunDir:
    """The directory of a new run of this machine, complete but for the run itself.

    Raises:
        KdError: the job is refused, or the directory cannot be made.
    """
    return _create(job, job.config, check(job.config), job.overrides, problems_of(job.config))


def _create(
    job: Job,
    config: RunConfig,
    contract: str,
    overrides: Sequence[str],
    problems: bytes | None,
    remote: Remote | None = None,
) -> runs.RunDir:
    return runs.create_run(
        config,
        evidence=job.evidence,
        contract_text=contract,
        name=job.name,
        overrides=overrides,
        remote=remote,
        evaluated=job.evaluated,
        problems=problems,
    )


async def make(job: Job, reach: Reach, say: Callable[[str], object]) -> runs.RunDir:
    """The directory of a new run, complete but for the run itself; for a run of another host, there too.

    What a host lacks is planned, the host is looked at, the gate is asked, and only then anything is sent.

    Args:
        job: what is to be made.
        reach: the ways to the hosts.
        say: told what is being sent, which can take its time.

    Raises:
        KdError: the job is refused, the directory cannot be made, or the host cannot be reached.
    """
    contract = await asyncio.to_thread(check, job.config, job.host)
    problems = await asyncio.to_thread(problems_of, job.config)
    await asyncio.to_thread(require_writable, job.evidence)
    if job.host is None:
        passed = await asyncio.to_thread(pass_gate, job, job.config, None, say)
        return await asyncio.to_thread(_create, job, job.config, contract, (*job.overrides, *passed), problems)
    from console.preflight import preflight, require
    from dispatch.remote import carry_out, plan_host, send_run

    plan = await plan_host(reach, job.host, job.config, say)
    found = await preflight(reach, job.host, job.config, job.evidence, plan=plan, say=say)
    forced = require(found, job.force)
    for line in found.lines:
        if line.outcome in ("FAIL", "WARN"):
            say(f"{job.host}: {line.name}: {line.found}" + (f"; {line.do}" if line.do else ""))
    passed = await asyncio.to_thread(pass_gate, job, plan.config, found.facts, say)
    await carry_out(reach, plan, say)
    remote = msgspec.structs.replace(plan.remote, facts=found.facts)
    overrides = (*job.overrides, *forced, *passed)
    run_dir = await asyncio.to_thread(_create, job, plan.config, contract, overrides, problems, remote)
    await send_run(reach, run_dir)
    return run_dir


def pass_gate(job: Job, config: RunConfig, facts: HostFacts | None, say: Callable[[str], object]) -> list[str]:
    """Asks the gate; returns what belongs in the manifest's `overrides`.

    Args:
        job: what is to be made.
        config: as it holds where it is to run.
        facts: of that host.
        say: told why the run may start.

    Raises:
        ConfigError: it may not; see `console.gate`.
    """
    if config.mode != "train":
        return []
    from console import gate

    found = gate.look(config, job.evidence, job.host, facts=facts)
    passed = gate.require(found, job.smoke, job.no_gate)
    if found.needed and found.smoke is not None:
        say(f"gate: {found.told(time.time())}")
    if job.no_gate is not None and not passed:
        say(f"--no-gate: not needed: {found.told(time.time())}")
    return passed


def wants_gpu(config: RunConfig) -> bool:
    """A run of this configuration trains on a GPU where there is one."""
    return config.train.device in ("auto", "cuda")


async def start(place: Place, config: RunConfig, *, again: bool = False) -> runs.Launch:
    """Starts a run of this configuration where it was made, on as many GPUs as it wants; see `Place.launch`."""
    devices = config.train.devices if config.makes_steps else 1
    return await place.launch(gpu=wants_gpu(config), devices=devices, again=again)


async def start_again(
    run_dir: runs.RunDir,
    allow_changed: Sequence[str],
    place: Place,
    loss: Callable[[str], object] | None = None,
    devices: int | None = None,
    run_generated_code: bool = False,
) -> None:
    """Another attempt of a run that ended before its last step, from its newest whole checkpoint.

    An evaluation that ended before its last answer goes on from what was generated and judged.

    Args:
        run_dir: the run.
        allow_changed: what may differ from its beginning.
        place: where it is.
        loss: accepts that its host lost the end of its stream; see `dispatch.mirror`.
        devices: how many train it from here on; None: as many as its configuration says.
        run_generated_code: the operator said again that the answers to an evaluation's problems may be run.

    Raises:
        ConfigError: so many devices cannot share its batch, or answers would be run and may not.
        RunError: it is no full run, it still runs, it is complete, or its stream there is not the one that is here.
    """
    mode = run_dir.manifest.mode
    if mode not in ("train", "evaluate"):
        again = {"prepare": "kdconsole prepare CONFIG once more goes on from what is whole"}
        raise RunError(f"run {run_dir.id}: a {mode}", expected="a training run", do=again.get(mode))
    # Of this attempt alone: the file stays as the manifest has it.
    config = load_config(
        run_dir.path / "config.yaml",
        overrides={"train.devices": devices},
        options={"train.devices": "--devices"},
    )
    if not run_generated_code:
        require_word(run_dir)
    if place.local:
        await asyncio.to_thread(check, config)
    now = await place.status()
    if now.state in ("running", "starting"):
        raise RunError(f"run {run_dir.id}: {now.state}", do=f"kdconsole --headless attach {run_dir.id}")
    outcome = run_dir.manifest.outcome
    judged = outcome is not None and (outcome.status == "COMPLETED" or outcome.exit_code == ExitCode.FAILED)
    whole = mode == "evaluate" and judged
    if whole or (now.exit is not None and now.exit.exit_code == ExitCode.OK):
        further = "train further" if mode == "train" else "ask again"
        raise RunError(f"run {run_dir.id}: complete already", do=f"start a new run to {further}")
    if not place.local:  # before the host goes on from what may be less than we have
        from dispatch.mirror import check_copy

        await check_copy(place.transport, place.run_dir, run_dir.path, python=place.python, loss=loss)
    before = None
    with contextlib.suppress(OSError):
        before = read_regular(run_dir.path / RESUME, _MAX_RESUME_BYTES)
    try:
        write_atomic(run_dir.path / RESUME, msgspec.json.encode(Resume(tuple(allow_changed), devices)))
    except OSError as error:
        raise RunError(f"{run_dir.path}: {error.strerror}", expected="a run directory that can be written") from None
    if not place.local:
        from dispatch.putting import put

        await put(place.transport, run_dir.path / RESUME, f"{place.run_dir}/{RESUME}", python=place.python)
    from dispatch.seal import reopen

    try:
        await start(place, config, again=True)
    except RunError:  # refused: its evidence is to stay as it was
        _put_back(run_dir.path / RESUME, before)
        raise
    await asyncio.to_thread(reopen, run_dir)


def require_word(run_dir: runs.RunDir) -> None:
    """Refuses to go on with an evaluation that runs generated code: that is to be said each time, on a command line.

    Raises:
        ConfigError: it is one.
    """
    if run_dir.manifest.mode == "evaluate" and (run_dir.path / PROBLEMS).exists():
        raise ConfigError(
            f"run {run_dir.id}: goes on to run generated code", expected="your word for it", do=goes_on_with(run_dir)
        )


def goes_on_with(run_dir: runs.RunDir) -> str:
    """The command that makes another attempt of a run, a training or an evaluation."""
    if run_dir.manifest.mode != "evaluate":
        return f"kdconsole train --resume {run_dir.id}"
    asked = " --run-generated-code" if (run_dir.path / PROBLEMS).exists() else ""
    return f"kdconsole evaluate --resume {run_dir.id}{asked}"


def _put_back(path: Path, content: bytes | None) -> None:
    with contextlib.suppress(OSError):
        if content is None:
            path.unlink()
        else:
            write_atomic(path, content)
