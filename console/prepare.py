"""What a run would be that has not been started: its values, its checks, its room. Without a screen."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from console.launch import check, contract_text
from console.room import Room, look
from console.run_files import read_exit
from dispatch import runs
from engine.config import ConfigProblems, Data, RunConfig, Student, Teacher, gate_fingerprint, load_config
from engine.errors import ConfigError, ExitCode, KdError
from engine.falsifiers import parse_contract
from engine.formats import ModelFiles, Role, inspect_model_dir, resolve_builtin
from engine.text import clean
from engine.vocabulary import check_vocabulary

Mode = Literal["smoke", "train"]
Outcome = Literal["PASS", "FAIL", "PENDING", "UNKNOWN"]

MAX_FILES = 200
"""YAML files of the working directory that are offered."""
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Draft:
    """What the operator has chosen; neither `template` nor `file`: nothing yet.

    Args:
        mode: to read the configuration for, whatever it says.
        template: name of a template.
        file: path of a YAML file.
        sets: `KEY=VALUE` texts in one line, separated and quoted as in a shell.
    """

    mode: Mode = "smoke"
    template: str | None = "builtin"
    file: Path | None = None
    sets: str = ""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at before a process is started; UNKNOWN tells something and forbids nothing."""

    name: str
    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Value:
    """A key of the configuration; `default` is None where there is none."""

    key: str
    text: str
    default: str | None

    @property
    def differs(self) -> bool:
        """Whether it is not what it would be without a word in the configuration."""
        return self.text != self.default


@dataclass(frozen=True)
class Prepared:
    """A draft that was looked at. `config` is None where `problems` say what is wrong with it."""

    draft: Draft
    problems: tuple[str, ...] = ()
    config: RunConfig | None = None
    checks: tuple[Check, ...] = ()
    room: Room | None = None
    values: tuple[Value, ...] = ()

    @property
    def refusals(self) -> tuple[str, ...]:
        """Everything that forbids a start; too little room does not, it has to be forced."""
        return (*self.problems, *(f"{c.name}: {c.text}" for c in self.checks if c.outcome == "FAIL"))


def yaml_files(directory: Path) -> list[Path]:
    """The YAML files of a directory by name, at most `MAX_FILES`; none where it cannot be read."""
    try:
        names = sorted(entry.name for entry in directory.iterdir() if entry.suffix in SUFFIXES and entry.is_file())
    except OSError:
        return []
    return [directory / name for name in names[:MAX_FILES]]


def prepare(draft: Draft, evidence: Path, environ: Mapping[str, str]) -> Prepared:
    """Looks at a draft; takes as long as it takes to read headers, tokenizers and manifests.

    Args:
        draft: what was chosen.
        evidence: where the run would be, and where a passed smoke is looked for.
        environ: variables, of which `KDCONSOLE_…` set keys as they do on the command line.
    """
    try:
        config = _resolve(draft, environ)
    except ConfigProblems as error:
        return Prepared(draft, problems=tuple(str(each) for each in error.problems))
    except (KdError, OSError) as error:
        return Prepared(draft, problems=(_said(error),))
    checks = [*_checks(config), *_gate(config, evidence)]
    room: Room | None = None
    try:
        room = look(config, evidence)
    except (KdError, OSError) as error:
        if not any(each.outcome == "FAIL" for each in checks):
            checks.append(Check("room", "FAIL", _said(error)))
    return Prepared(draft, config=config, checks=tuple(checks), room=room, values=values(config))


def values(config: RunConfig) -> tuple[Value, ...]:
    """Every key of a configuration in the schema's order, beside its default."""
    nothing = RunConfig(teacher=Teacher(path="-"), student=Student(path="-"), data=Data(path="-"))
    defaults = dict(_flat(msgspec.to_builtins(nothing)))
    for required in ("teacher", "teacher.path", "student.path", "data.path"):
        defaults.pop(required, None)
    flat = _flat(msgspec.to_builtins(config))
    return tuple(Value(key, _written(v), _written(defaults[key]) if key in defaults else None) for key, v in flat)


def passed_smoke(config: RunConfig, evidence: Path) -> str | None:
    """The id of the newest smoke in `evidence` that passed with the same gate fingerprint."""
    wanted = gate_fingerprint(config)
    for each in runs.find_runs(evidence):
        if each.manifest.mode == "smoke" and each.manifest.gate_fingerprint == wanted and _ended_well(each.path):
            return each.id
    return None


def _ended_well(run: Path) -> bool:
    try:
        record = read_exit(run)
    except KdError:
        return False
    return record is not None and record.exit_code == ExitCode.OK


def _resolve(draft: Draft, environ: Mapping[str, str]) -> RunConfig:
    if draft.file is None and draft.template is None:
        raise ConfigError("no configuration yet", do="type the path of a YAML file, or choose one from the list")
    try:
        sets = shlex.split(draft.sets)
    except ValueError as error:
        problem = f"set: {clean(str(error)).lower()}"
        raise ConfigError(problem, expected="KEY=VALUE texts, quoted as in a shell") from None
    file = None if draft.file is None else Path(os.path.expanduser(draft.file))
    return load_config(file, sets=sets, environ=environ, template=draft.template, overrides={"mode": draft.mode})


def _checks(config: RunConfig) -> list[Check]:
    """Each part by itself, so that all that is wrong is seen at once; the last one is the check that a start makes."""
    source, random = config.student.source, config.student.starts_random
    found: dict[Role, ModelFiles] = {}

    def contract() -> str:
        path = config.contract.path
        return f"{clean(path, 200)}, {len(parse_contract(contract_text(config), path).falsifiers)} falsifiers"

    def student() -> str:
        found["student"] = inspect_model_dir(resolve_builtin(source), "student", need_weights=not random)
        return _model(source, found["student"]) + (", random weights" if random else "")

    def teacher() -> str:
        if config.teacher is None:
            return "none: plain training"
        found["teacher"] = inspect_model_dir(resolve_builtin(config.teacher.path), "teacher")
        return _model(config.teacher.path, found["teacher"])

    def data() -> str:
        check(config)
        return ", ".join(clean(path, 200) for path in config.data.paths)

    checks = [_run("contract", contract), _run("teacher", teacher), _run("student", student)]
    if len(found) == 2:
        checks.append(_vocabulary(found["teacher"], found["student"]))
    if any(each.outcome == "FAIL" for each in checks):
        return [*checks, Check("data", "PENDING", "looked at once the above is right")]
    return [*checks, _run("data", data)]


def _run(name: str, part: Callable[[], str]) -> Check:
    try:
        return Check(name, "PASS", part())
    except (KdError, OSError) as error:
        return Check(name, "FAIL", _said(error))


def _vocabulary(teacher: ModelFiles, student: ModelFiles) -> Check:
    try:
        told = check_vocabulary(teacher.vocab_size, student.vocab_size, teacher.tokenizer_dir, student.tokenizer_dir)
    except (KdError, OSError) as error:
        return Check("vocabulary", "FAIL", _said(error).removeprefix("vocabulary: "))
    return Check("vocabulary", "PASS" if told.status == "PASS" else "UNKNOWN", clean(told.observed, 2000))


def _model(path: str, found: ModelFiles) -> str:
    size = f", {_count(found.parameters)} parameters" if found.parameters else ""
    return f"{clean(path, 200)}, {clean(found.model_type, 60)}{size}"


def _gate(config: RunConfig, evidence: Path) -> Iterator[Check]:
    if config.mode != "train":
        return
    smoke = passed_smoke(config, evidence)
    if smoke is None:
        yield Check("smoke", "UNKNOWN", "none has passed with this configuration here; a minute now may save days")
    else:
        yield Check("smoke", "PASS", f"{clean(smoke, 200)} passed with this configuration")


def _flat(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        below = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _flat(value, below)
        else:
            yield below, value


def _written(value: object) -> str:
    """A value as an operator would write it; large whole numbers with separators, to be read."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return clean(f"[{', '.join(map(_written, value))}]", 2000)
    return clean(str(value), 2000)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _said(error: Exception) -> str:
    return clean(str(error), 2000)
