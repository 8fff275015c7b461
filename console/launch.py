"""What comes before a run: everything that can be refused without torch, the directory, the start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dispatch import runs
from dispatch.manifest import Remote
from dispatch.places import Place, Reach
from dispatch.supervisor import read_regular, write_atomic
from engine.cautions import needs_two_models, one_model
from engine.config import RunConfig, load_config
from engine.errors import ConfigError, DataError, ExitCode, RunError
from engine.contract import contract_name
from engine.falsifiers import builtin_contract, parse_contract
from engine.formats import ModelFiles, inspect_model_dir, resolve_builtin, same_files
from engine.measures import require_measured
from engine.resume import RESUME, Resume
from engine.schema import ON_HOST
from engine.text import clean
from engine.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from dispatch.facts import HostFacts

MAX_CONTRACT_BYTES = 1 << 20
BUILTIN_CORPUS = "builtin:stdlib"
PROBE_BYTES = 16 << 10
"""As much as the first files of a run take."""


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

    @property
    def stops_on_interrupt(self) -> bool:
        """A smoke is waited for and dies with the wait; a long run is only watched."""
        return self.config.mode == "smoke"


def mode_overrides(mode: str, sets: Sequence[str]) -> dict[str, object]:
    """What is set for a mode, as `load_config` takes it.

    The contract of a configuration is that of its trainings, and a preparation makes none of their claims: it has its
    own one, unless one is set for it.

    Args:
        mode: smoke, train or prepare.
        sets: the operator's `KEY=VALUE` texts.
    """
    if mode != "prepare" or any(each.partition("=")[0].strip().partition(".")[0] == "contract" for each in sets):
        return {"mode": mode}
    return {"mode": mode, "contract.path": "builtin"}


def check(config: RunConfig, host: str | None = None) -> str:
    """Everything that can be refused before a process is started; returns the contract's text.

    What is on the host already is looked at there, by the engine.

    Args:
        config: of the run.
        host: where it is to run; None is this machine.

    Raises:
        ConfigError, ModelError, DataError, RunError: what is wrong, in one message.
    """
    text = contract_text(config)
    require_measured(parse_contract(text, config.contract.path), config, config.contract.path)
    wanted, given, tokenizer = config.student, config.teacher, config.data.tokenizer
    paths = [wanted.source, *([given.path] if given else []), *config.data.paths, *([tokenizer] if tokenizer else [])]
    paths += [given.cache] if given is not None and given.cache is not None else []
    for path in paths:
        if host is None and ON_HOST.match(path):
            raise ConfigError(
                f"{clean(path, 300)}: is on another machine", expected="a path of this one", do="run it there: --host"
            )
    student = teacher = None
    if not ON_HOST.match(wanted.source):
        student = inspect_model_dir(resolve_builtin(wanted.source), "student", need_weights=not wanted.starts_random)
    if given is not None and not ON_HOST.match(given.path):
        teacher = inspect_model_dir(resolve_builtin(given.path), "teacher")
    if student is not None and teacher is not None:
        check_vocabulary(teacher.vocab_size, student.vocab_size, teacher.tokenizer_dir, student.tokenizer_dir)
    _check_two_models(config, teacher, student)
    _check_corpus([path for path in config.data.paths if not ON_HOST.match(path)])
    if tokenizer is None or tokenizer == "builtin" or ON_HOST.match(tokenizer):
        return text
    if not (Path(tokenizer) / "tokenizer.json").is_file():
        shown = clean(tokenizer, 300)
        raise DataError(
            f"data.tokenizer: {shown} has no tokenizer.json", expected="a directory that has one, or builtin"
        )
    return text


def _check_two_models(config: RunConfig, teacher: ModelFiles | None, student: ModelFiles | None) -> None:
    """Refuses a long run whose teacher is its student by the files; the engine looks at the weights themselves."""
    wanted, given = config.student, config.teacher
    if given is None or not needs_two_models(config) or wanted.starts_random or wanted.layers is not None:
        return
    there = student is None and teacher is None and wanted.source == given.path
    if there or (student is not None and teacher is not None and same_files(teacher, student)):
        raise one_model(config)


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
        return builtin_contract(contract_name(config))
    path = Path(config.contract.path)
    try:
        return read_regular(path, MAX_CONTRACT_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"contract {path}: {error.strerror}", expected="a YAML file or builtin") from None
    except UnicodeDecodeError:
        raise ConfigError(f"contract {path}: not UTF-8", expected="a YAML file") from None


def create(job: Job) -> runs.RunDir:
    """The directory of a new run of this machine, complete but for the run itself.

    Raises:
        KdError: the job is refused, or the directory cannot be made.
    """
    return _create(job, job.config, check(job.config), job.overrides)


def _create(
    job: Job, config: RunConfig, contract: str, overrides: Sequence[str], remote: Remote | None = None
) -> runs.RunDir:
    return runs.create_run(
        config, evidence=job.evidence, contract_text=contract, name=job.name, overrides=overrides, remote=remote
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
    await asyncio.to_thread(require_writable, job.evidence)
    if job.host is None:
        passed = await asyncio.to_thread(pass_gate, job, job.config, None, say)
        return await asyncio.to_thread(_create, job, job.config, contract, (*job.overrides, *passed))
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
    run_dir = await asyncio.to_thread(_create, job, plan.config, contract, overrides, remote)
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


def require_writable(evidence: Path) -> None:
    """Refuses a directory for runs that cannot be made or written in, before anything else is done.

    Raises:
        RunError: it cannot.
    """
    problem = writable_problem(evidence, probe=True)
    if problem:
        raise RunError(problem, expected="a directory that can be written", do="choose one with --evidence DIR")


def writable_problem(evidence: Path, *, probe: bool) -> str:
    """Why no run can be kept in a directory, which need not be there yet; empty when it can.

    Args:
        evidence: the directory.
        probe: write a file there, or where it would be made, and remove it: only that tells for certain.
    """
    there = Path(os.path.abspath(evidence))
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    shown = clean(str(there), 300)
    if not there.is_dir():
        return f"{shown}: is {'a file' if there.is_file() else 'no directory'}"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{shown}: cannot be written"
    if probe:
        file = there / f".kdconsole-{secrets.token_hex(4)}"
        try:
            with file.open("xb") as opened:
                opened.write(b"\0" * PROBE_BYTES)
        except OSError as error:
            return f"{shown}: {error.strerror}"
        finally:
            file.unlink(missing_ok=True)
    return ""


def wants_gpu(config: RunConfig) -> bool:
    """A run of this configuration trains on a GPU where there is one."""
    return config.train.device in ("auto", "cuda")


async def start(place: Place, config: RunConfig, *, again: bool = False) -> runs.Launch:
    """Starts a run of this configuration where it was made, on as many GPUs as it wants; see `Place.launch`."""
    devices = 1 if config.mode == "prepare" else config.train.devices
    return await place.launch(gpu=wants_gpu(config), devices=devices, again=again)


async def start_again(
    run_dir: runs.RunDir,
    allow_changed: Sequence[str],
    place: Place,
    loss: Callable[[str], object] | None = None,
    devices: int | None = None,
) -> None:
    """Another attempt of a run that ended before its last step, from its newest whole checkpoint.

    Args:
        run_dir: the run.
        allow_changed: what may differ from its beginning.
        place: where it is.
        loss: accepts that its host lost the end of its stream; see `dispatch.mirror`.
        devices: how many train it from here on; None: as many as its configuration says.

    Raises:
        ConfigError: so many devices cannot share its batch.
        RunError: it is no full run, it still runs, it is complete, or its stream there is not the one that is here.
    """
    if run_dir.manifest.mode != "train":
        again = {"prepare": "kdconsole prepare CONFIG once more goes on from what is whole"}
        mode = run_dir.manifest.mode
        raise RunError(f"run {run_dir.id}: a {mode}", expected="a training run", do=again.get(mode))
    # Of this attempt alone: the file stays as the manifest has it.
    config = load_config(
        run_dir.path / "config.yaml",
        overrides={"train.devices": devices},
        options={"train.devices": "--devices"},
    )
    if place.local:
        await asyncio.to_thread(check, config)
    now = await place.status()
    if now.state in ("running", "starting"):
        raise RunError(f"run {run_dir.id}: {now.state}", do=f"kdconsole --headless attach {run_dir.id}")
    if now.exit is not None and now.exit.exit_code == ExitCode.OK:
        raise RunError(f"run {run_dir.id}: complete already", do="start a new run to train further")
    if not place.local:  # before the host goes on from what may be less than we have
        from dispatch.mirror import check_copy

        await check_copy(place.transport, place.run_dir, run_dir.path, python=place.python, loss=loss)
    before = None
    with contextlib.suppress(OSError):
        before = read_regular(run_dir.path / RESUME, MAX_CONTRACT_BYTES)
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


def _put_back(path: Path, content: bytes | None) -> None:
    with contextlib.suppress(OSError):
        if content is None:
            path.unlink()
        else:
            write_atomic(path, content)
