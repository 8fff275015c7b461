"""What `kdconsole evaluate` is to look at: the model that was named, and the configuration of its evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from console.checks import BUILTIN_CORPUS
from console.launch import goes_on_with, mode_overrides
from dispatch.manifest import MANIFEST, SUMS, Evaluated
from dispatch.model_files import MODEL, listed_model, model_digest, model_files
from dispatch.runs import RunDir, open_run, resolve_run
from dispatch.sums import read_sums
from engine.config import RunConfig, load_config
from engine.errors import ConfigError, DataError, RunError
from engine.formats import BUILTINS
from engine.schema import ON_HOST
from engine.text import clean

OPTIONS: Final[Mapping[str, str]] = {
    "evaluate.suite": "--suite",
    "evaluate.samples": "--samples",
    "evaluate.limit": "--limit",
    "evaluate.temperature": "--temperature",
    "evaluate.top_p": "--top-p",
    "evaluate.max_new_tokens": "--max-new-tokens",
    "evaluate.batch": "--batch",
    "evaluate.seed": "--seed",
    "evaluate.run_generated_code": "--run-generated-code",
    "teacher.path": "--teacher",
    "data.path": "--data",
    "contract.path": "--contract",
}
"""The option that sets a key, as messages name it."""
_FLAG: Final = "evaluate.run_generated_code"
_VARIABLE: Final = "KDCONSOLE_EVALUATE__RUN_GENERATED_CODE"
_MODELS: Final = tuple(f"builtin:{name}" for name in BUILTINS)
_TOKENIZER: Final = "tokenizer.json"


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated."""

    model: str
    """As `student.path` names it."""
    evaluated: Evaluated
    """For the manifest."""
    run: RunDir | None = None
    """The training that exported it; None where the model itself was named."""
    files: frozenset[str] = frozenset()
    """Names of its files, as far as they are known here."""

    @property
    def config(self) -> Path | None:
        """The configuration that its teacher, data and tokenizer are taken from."""
        return None if self.run is None else self.run.path / "config.yaml"


def find_subject(named: str, evidence: Path, host: str | None) -> Subject:
    """The model that an operator means; large weights are hashed.

    Args:
        named: a training run (its id, the beginning of it, its directory), a model's directory or file, `host:/path`,
            or one of the built-in models.
        evidence: whose runs are meant.
        host: where it is to be evaluated; None is this machine.

    Raises:
        RunError: it is no training run, or one whose exported model cannot be had there, or was changed.
        ConfigError: the model cannot be read.
    """
    if named in _MODELS or ON_HOST.match(named):
        return Subject(named, Evaluated(model=clean(named, 4096)))
    path = Path(os.path.expanduser(named))
    if (path / MANIFEST).is_file():
        return _of_run(open_run(path), host)
    if path.exists():
        where = os.path.abspath(path)
        files = model_files(Path(where))
        return Subject(where, Evaluated(model=clean(where, 4096), sha256=model_digest(files)), files=frozenset(files))
    if os.sep in named:
        raise RunError(
            f"{clean(named, 300)}: no such file or directory", expected="a training run or a model's directory"
        )
    return _of_run(resolve_run(evidence, named), host)


def _of_run(run_dir: RunDir, host: str | None) -> Subject:
    manifest, remote = run_dir.manifest, run_dir.manifest.remote
    if manifest.mode != "train":
        raise RunError(f"run {run_dir.id}: {_no_model(run_dir)}", expected="a training run, whose model is evaluated")
    listed = listed_model(read_sums(run_dir.path).files) if (run_dir.path / SUMS).is_file() else {}
    run = Evaluated(model="", run=run_dir.run, run_id=run_dir.id)
    if remote is not None and remote.host == host:
        model = f"{host}:{remote.run_dir}/{MODEL}"
        digest = model_digest(listed) if listed else None
        return Subject(model, replace(run, model=clean(model, 4096), sha256=digest), run_dir, frozenset(listed))
    path = Path(os.path.abspath(run_dir.path / MODEL))
    if not path.is_dir():
        raise RunError(
            f"run {run_dir.id}: no exported model in {clean(str(path.parent), 300)}",
            expected=f"its {MODEL}/",
            do=_how_to_get_it(run_dir),
        )
    files = model_files(path)
    changed = sorted(name for name in listed.keys() | files.keys() if listed and listed.get(name) != files.get(name))
    if changed:
        raise RunError(
            f"run {run_dir.id}: not the {MODEL}/ that its {SUMS} has: {clean(', '.join(changed[:3]), 300)}"
            + (f" and {len(changed) - 3} more" if len(changed) > 3 else ""),
            expected="the model as it was when the run ended",
            do=f"to evaluate it as it is: kdconsole evaluate {clean(str(path), 300)}",
        )
    found = replace(run, model=clean(str(path), 4096), sha256=model_digest(files))
    return Subject(str(path), found, run_dir, frozenset(files))


def _no_model(run_dir: RunDir) -> str:
    if run_dir.manifest.mode != "evaluate":
        return f"a {clean(run_dir.manifest.mode, 40)}, which exports no model"
    told, of = f"an evaluation; it goes on with {goes_on_with(run_dir)}", run_dir.manifest.evaluated
    return told if of is None else f"{told}, and kdconsole evaluate {of.run_id or of.model} makes another one"


def _how_to_get_it(run_dir: RunDir) -> str:
    remote = run_dir.manifest.remote
    if remote is not None:
        return f"kdconsole fetch {run_dir.id} --model brings it here, --host {remote.host} evaluates it there"
    if (run_dir.path / "model.rejected").is_dir():
        return f"its export was rejected: see kdconsole review {run_dir.id}"
    if (run_dir.path / "checkpoints").is_dir():
        return f"kdconsole export {run_dir.id} writes that of its newest checkpoint, {goes_on_with(run_dir)} goes on"
    return f"{goes_on_with(run_dir)} goes on to its end, where it is written"


def configure(
    subject: Subject,
    host: str | None,
    *,
    given: Mapping[str, object],
    sets: Sequence[str],
    environ: Mapping[str, str],
    run_generated_code: bool,
    walls: Callable[[], str],
) -> RunConfig:
    """The configuration of an evaluation: of a run's model what its training had, with the options over it.

    Args:
        subject: what is evaluated.
        host: where; None is this machine.
        given: full key path to the value of an option; None: not given.
        sets: `KEY=VALUE` texts.
        environ: variables.
        run_generated_code: the operator said so.
        walls: tells what generated code is contained by, for the refusal of one who did not.

    Raises:
        ConfigError: something is wrong with it, or answers would be run and may not.
        DataError: it needs held-out text and nothing says which.
    """
    _require_said_by_flag(sets, environ)
    keys = [each.partition("=")[0].strip() for each in sets]
    texts = {key: each for key, each in given.items() if each is not None}
    has_data = subject.run is not None or "data.path" in texts or _is_set("data", "path", keys, environ)
    config = load_config(
        subject.config,
        sets=sets if subject.run is not None else ["teacher=null", *sets],
        environ=environ,
        overrides={
            **mode_overrides("evaluate", sets),
            "student": {"path": subject.model},
            _FLAG: True,
            **({} if has_data else {"data.path": BUILTIN_CORPUS}),
            **texts,
        },
        options=OPTIONS,
    )
    _require_fitting(config, texts, run_generated_code)
    if config.train.accumulation == "auto":  # of steps, which it does not make
        config = replace(config, train=replace(config.train, accumulation=1))
    config = replace(config, evaluate=replace(config.evaluate, run_generated_code=run_generated_code))
    own_tokenizer = not _is_set("data", "tokenizer", keys, environ) and _TOKENIZER in subject.files
    if own_tokenizer:  # an export has that of its training beside it
        config = replace(config, data=replace(config.data, tokenizer=None))
    if config.evaluate.runs_code:
        if not run_generated_code:
            raise _not_said(config, host, walls())
        data = replace(config.data, path=BUILTIN_CORPUS, limit_bytes=None)
        config = replace(config, teacher=None, data=data)  # neither is looked at, checked or sent
    elif not has_data:
        raise DataError(
            f"{clean(subject.model, 300)}: nothing says which text was held out from it",
            expected="--data PATH, or a training run in place of the model, which knows it",
            do="--suite humaneval needs no text",
        )
    config = _moved(config, subject, host)
    if config.teacher is not None:  # what was stored of it belongs to one training's steps
        return replace(config, teacher=replace(config.teacher, source="online", cache=None))
    return replace(config, distill=replace(config.distill, alpha=1.0))


def _is_set(section: str, key: str, keys: Iterable[str], environ: Mapping[str, str]) -> bool:
    variable = f"KDCONSOLE_{section.upper()}"
    named = variable in environ or f"{variable}__{key.upper()}" in environ
    return named or any(each in (section, f"{section}.{key}") for each in keys)


def _require_said_by_flag(sets: Sequence[str], environ: Mapping[str, str]) -> None:
    """Refuses every other way to say that generated code may run: it is to be typed each time."""
    where = [f"--set {_FLAG}" for each in sets if each.partition("=")[0].strip() == _FLAG]
    where += [_VARIABLE] if _VARIABLE in environ else []
    if where:
        raise ConfigError(
            f"{where[0]}: nothing but an option of the command itself may allow it", expected="--run-generated-code"
        )


def _require_fitting(config: RunConfig, given: Mapping[str, object], run_generated_code: bool) -> None:
    """Refuses options that would do nothing with the suite."""
    if config.evaluate.runs_code:
        for key in ("teacher.path", "data.path"):
            if key in given:
                raise ConfigError(
                    f"{OPTIONS[key]}: problems are asked of the student alone", expected="--suite heldout with it"
                )
        return
    useless = [key for key in given if key.startswith("evaluate.") and key != "evaluate.suite"]
    if useless or run_generated_code:
        option = OPTIONS[useless[0]] if useless else OPTIONS[_FLAG]
        raise ConfigError(
            f"{option}: held-out text is only read, nothing is generated",
            expected="--suite humaneval, or a file of problems, with it",
        )


def _not_said(config: RunConfig, host: str | None, walls: str) -> ConfigError:
    where = f"on {host}" if host else "on this machine"
    return ConfigError(
        f"--suite {clean(config.evaluate.suite, 300)}: its answers are programs that a model wrote, and to judge them "
        f"is to run them {where}",
        expected="--run-generated-code, which says that you want that",
        do=f"each runs by itself, {walls}; docs/sandbox.md has the rest",
    )


def _moved(config: RunConfig, subject: Subject, host: str | None) -> RunConfig:
    """The configuration with what a run's own one names where it can be had: on the host that the run was on.

    Raises:
        ConfigError: it is there, and the evaluation is not.
    """
    if subject.run is None or subject.config is None or subject.run.manifest.remote is None:
        return config
    own, where = load_config(subject.config), subject.run.manifest.remote.host
    theirs = {*own.data.paths, *([own.teacher.path] if own.teacher else [])}
    theirs |= {own.data.tokenizer} if own.data.tokenizer else set()

    def there(path: str, option: str) -> str:
        if path not in theirs or path == "builtin" or path.startswith("builtin:") or ON_HOST.match(path):
            return path
        if host == where:
            return f"{host}:{path}"
        raise ConfigError(
            f"run {subject.run.id if subject.run else ''}: {clean(path, 300)} is on {where}",
            expected=f"--host {where}, or {option} for one that is here",
        )

    data = replace(config.data, path=[there(path, "--data PATH") for path in config.data.paths])
    if len(data.paths) == 1:
        data = replace(data, path=data.paths[0])
    if data.tokenizer is not None:
        data = replace(data, tokenizer=there(data.tokenizer, "--set data.tokenizer=DIR"))
    teacher = config.teacher
    if teacher is not None:
        teacher = replace(teacher, path=there(teacher.path, "--teacher DIR"))
    return replace(config, data=data, teacher=teacher)
