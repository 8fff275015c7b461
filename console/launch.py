"""What comes before a run: everything that can be refused without torch, the directory, the start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dispatch import runs
from dispatch.manifest import EXIT, SUMS, Remote
from dispatch.places import Place, Reach
from dispatch.supervisor import read_regular, write_atomic
from engine.config import RunConfig, load_config
from engine.errors import ConfigError, DataError, ExitCode, RunError
from engine.falsifiers import builtin_contract, parse_contract
from engine.formats import inspect_model_dir, resolve_builtin
from engine.schema import ON_HOST
from engine.text import clean
from engine.vocabulary import check_vocabulary

MAX_CONTRACT_BYTES = 1 << 20
BUILTIN_CORPUS = "builtin:stdlib"
RESUME = "resume.json"


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

    @property
    def stops_on_interrupt(self) -> bool:
        """A smoke is waited for and dies with the wait; a long run is only watched."""
        return self.config.mode == "smoke"


def check(config: RunConfig, host: str | None = None) -> str:
    """Everything that can be refused before a process is started; returns the contract's text.

    What is on the host already is looked at there, by the engine.

    Args:
        config: of the run.
        host: where it is to run; None is this machine.

    Raises:
        ConfigError, ModelError, DataError: what is wrong, in one message.
    """
    text = contract_text(config)
    parse_contract(text, config.contract.path)
    wanted, given, tokenizer = config.student, config.teacher, config.data.tokenizer
    paths = [wanted.source, *([given.path] if given else []), *config.data.paths, *([tokenizer] if tokenizer else [])]
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
    _check_corpus([path for path in config.data.paths if not ON_HOST.match(path)])
    if tokenizer is None or tokenizer == "builtin" or ON_HOST.match(tokenizer):
        return text
    if not (Path(tokenizer) / "tokenizer.json").is_file():
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
    return _create(job, job.config, check(job.config))


def _create(job: Job, config: RunConfig, contract: str, remote: Remote | None = None) -> runs.RunDir:
    return runs.create_run(
        config, evidence=job.evidence, contract_text=contract, name=job.name, overrides=job.overrides, remote=remote
    )


async def make(job: Job, reach: Reach, say: Callable[[str], object]) -> runs.RunDir:
    """The directory of a new run, complete but for the run itself; for a run of another host, there too.

    Args:
        job: what is to be made.
        reach: the ways to the hosts.
        say: told what is being sent, which can take its time.

    Raises:
        KdError: the job is refused, the directory cannot be made, or the host cannot be reached.
    """
    if job.host is None:
        return await asyncio.to_thread(create, job)
    from dispatch.remote import prepare_host, send_run

    contract = await asyncio.to_thread(check, job.config, job.host)
    config, remote = await prepare_host(reach, job.host, job.config, say)
    run_dir = await asyncio.to_thread(_create, job, config, contract, remote)
    await send_run(reach, run_dir)
    return run_dir


def wants_gpu(config: RunConfig) -> bool:
    """A run of this configuration trains on a GPU where there is one."""
    return config.train.device in ("auto", "cuda")


async def start_again(run_dir: runs.RunDir, allow_changed: Sequence[str], place: Place) -> None:
    """Another attempt of a run that ended before its last step, from its newest whole checkpoint.

    Raises:
        RunError: it is no full run, it still runs, or it is complete.
    """
    if run_dir.manifest.mode != "train":
        raise RunError(f"run {run_dir.id}: a {run_dir.manifest.mode}", expected="a training run")
    config = load_config(run_dir.path / "config.yaml")
    if place.local:
        await asyncio.to_thread(check, config)
    now = await place.status()
    if now.state in ("running", "starting"):
        raise RunError(f"run {run_dir.id}: {now.state}", do=f"kdconsole --headless attach {run_dir.id}")
    if now.exit is not None and now.exit.exit_code == ExitCode.OK:
        raise RunError(f"run {run_dir.id}: complete already", do="start a new run to train further")
    try:
        write_atomic(run_dir.path / RESUME, json.dumps({"allow_changed": list(allow_changed)}).encode())
    except OSError as error:
        raise RunError(f"{run_dir.path}: {error.strerror}", expected="a run directory that can be written") from None
    if not place.local:
        from dispatch.transfer import put

        await put(place.transport, run_dir.path / RESUME, f"{place.run_dir}/{RESUME}", python=place.python)
    await place.launch(gpu=wants_gpu(config), again=True)
    if not place.local:  # there the supervisor has put them aside
        for name in (EXIT, SUMS):
            (run_dir.path / name).unlink(missing_ok=True)
