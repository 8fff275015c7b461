"""What can be refused of a run before anything is made or started for it, without torch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from dispatch.supervisor import read_regular
from engine.cautions import needs_two_models, one_model
from engine.config import RunConfig
from engine.contract import contract_name
from engine.errors import ConfigError, DataError, RunError
from engine.falsifiers import builtin_contract, parse_contract
from engine.formats import ModelFiles, inspect_model_dir, resolve_builtin, same_files
from engine.measures import require_measured
from engine.problems import suite_bytes
from engine.schema import ON_HOST
from engine.text import clean
from engine.vocabulary import check_vocabulary

MAX_CONTRACT_BYTES = 1 << 20
BUILTIN_CORPUS = "builtin:stdlib"
PROBE_BYTES = 16 << 10
"""As much as the first files of a run take."""


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
    _check_answers(config, host, student)
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


def _check_answers(config: RunConfig, host: str | None, student: ModelFiles | None) -> None:
    """What an evaluation on problems needs besides: a tokenizer, and here a place where its answers can be run."""
    if config.mode != "evaluate" or not config.evaluate.runs_code:
        return
    if student is not None and student.tokenizer_dir is None and config.data.tokenizer is None:
        raise DataError(
            f"{clean(config.student.source, 300)}: has no tokenizer.json",
            expected="the tokenizer that the model was trained with",
            do="--set data.tokenizer=DIR names it",
        )
    if host is None:
        from engine.sandbox import containment

        found = containment()
        if not found.sufficient:
            raise RunError(f"generated code cannot be contained here: {clean(found.reason, 500)}")


def problems_of(config: RunConfig) -> bytes | None:
    """The problems that an evaluation asks, which go with its run; None of every other run.

    Raises:
        ConfigError: they are on another machine.
        SuiteError: they cannot be read, or one of them is none.
    """
    if config.mode != "evaluate" or not config.evaluate.runs_code:
        return None
    if ON_HOST.match(config.evaluate.suite):
        raise ConfigError(
            f"--suite {clean(config.evaluate.suite, 300)}: is on another machine",
            expected="humaneval or a file of this machine, from where the problems are sent along",
        )
    return suite_bytes(config.evaluate.suite)


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
