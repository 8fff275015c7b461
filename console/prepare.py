"""What a run would be that has not been started: its values, its checks, its room. Without a screen."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from console import gate
from console.checks import check, contract_text
from console.gate import Gate
from console.launch import mode_overrides
from console.room import Room, look, shortage
from console.stored import missing_store
from engine.config import ConfigProblems, Data, RunConfig, Student, Teacher, load_config
from engine.errors import ConfigError, KdError
from engine.falsifiers import parse_contract
from engine.formats import ModelFiles, Role, inspect_model_dir, resolve_builtin
from engine.measures import require_measured
from engine.schema import ON_HOST
from engine.text import clean
from engine.vocabulary import check_vocabulary

Mode = Literal["smoke", "train", "prepare"]
Outcome = Literal["PASS", "FAIL", "PENDING", "UNKNOWN"]

MAX_FILES = 200
"""YAML files of the working directory that are offered."""
SUFFIXES = (".yaml", ".yml")
SMOKE = "smoke"
"""Name of the check that the gate makes."""


@dataclass(frozen=True)
class Draft:
    """What the operator has chosen; neither `template` nor `file`: nothing yet.

    Args:
        mode: to read the configuration for, whatever it says.
        template: name of a template.
        file: path of a YAML file.
        sets: `KEY=VALUE` texts in one line, separated and quoted as in a shell.
        host: the host that it is to run on; None is this machine.
    """

    mode: Mode = "smoke"
    template: str | None = "builtin"
    file: Path | None = None
    sets: str = ""
    host: str | None = None


@dataclass(frozen=True)
class Check:
    """One thing that was looked at before a process is started; UNKNOWN tells something and forbids nothing."""

    name: str
    outcome: Outcome
    text: str
    forcible: bool = False
    """A FAIL that the operator may override."""


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
    gate: Gate | None = None
    """What the gate says of a training; None for everything else, and where its host was not looked at yet."""
    complete: bool = True
    """All was looked at; not so before a host has answered."""

    @property
    def refusals(self) -> tuple[str, ...]:
        """Everything that forbids a start and cannot be overridden here."""
        failed = (c for c in self.checks if c.outcome == "FAIL" and not c.forcible)
        return (*self.problems, *(f"{c.name}: {c.text}" for c in failed))

    @property
    def shortages(self) -> tuple[str, ...]:
        """What forbids a start unless it is forced: too little room above all."""
        here = () if self.room is None else tuple(map(shortage, self.room.shortages))
        return (
            *here,
            *(f"{c.name}: {c.text}" for c in self.checks if c.outcome == "FAIL" and c.name != SMOKE and c.forcible),
        )

    @property
    def gate_closed(self) -> bool:
        """It wants a passed smoke and has none: it starts only with a reason."""
        return self.gate is not None and not self.gate.open


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
    checks = _checks(config, draft.host)
    if draft.host is not None:
        later = "looking at it: its memory and disk, what is to be sent, the gate"
        checks.append(Check(draft.host, "PENDING", later))
        return Prepared(draft, config=config, checks=tuple(checks), values=values(config), complete=False)
    found = gate.look(config, evidence) if config.mode == "train" else None
    if found is not None:
        checks.append(gate_check(found))
    room: Room | None = None
    try:
        room = look(config, evidence)
    except (KdError, OSError) as error:
        if not any(each.outcome == "FAIL" for each in checks):
            checks.append(Check("room", "FAIL", _said(error)))
    return Prepared(draft, config=config, checks=tuple(checks), room=room, values=values(config), gate=found)


def values(config: RunConfig) -> tuple[Value, ...]:
    """Every key of a configuration in the schema's order, beside its default."""
    nothing = RunConfig(teacher=Teacher(path="-"), student=Student(path="-"), data=Data(path="-"))
    defaults = dict(_flat(msgspec.to_builtins(nothing)))
    for required in ("teacher", "teacher.path", "student.path", "data.path"):
        defaults.pop(required, None)
    flat = _flat(msgspec.to_builtins(config))
    return tuple(Value(key, _written(v), _written(defaults[key]) if key in defaults else None) for key, v in flat)


def smoke_command(draft: Draft, evidence: Path) -> str:
    """The command that makes the smoke of what was chosen; empty where there is none: a template has no file."""
    if draft.file is None and draft.template != "builtin":
        return ""
    given = [] if draft.file is None else [str(draft.file)]
    try:
        sets = shlex.split(draft.sets)
    except ValueError:
        return ""
    given += [word for each in sets for word in ("--set", each)]
    return gate.smoke_command(given, host=draft.host, evidence=evidence)


def _resolve(draft: Draft, environ: Mapping[str, str]) -> RunConfig:
    if draft.file is None and draft.template is None:
        raise ConfigError("no configuration yet", do="type the path of a YAML file, or choose one from the list")
    try:
        sets = shlex.split(draft.sets)
    except ValueError as error:
        problem = f"set: {clean(str(error)).lower()}"
        raise ConfigError(problem, expected="KEY=VALUE texts, quoted as in a shell") from None
    file = None if draft.file is None else Path(os.path.expanduser(draft.file))
    given = mode_overrides(draft.mode, sets)
    return load_config(file, sets=sets, environ=environ, template=draft.template, overrides=given)


def _checks(config: RunConfig, host: str | None) -> list[Check]:
    """Each part by itself, so that all that is wrong is seen at once; the last one is the check that a start makes."""
    source, random = config.student.source, config.student.starts_random
    found: dict[Role, ModelFiles] = {}

    def contract() -> str:
        path = config.contract.path
        parsed = parse_contract(contract_text(config), path)
        require_measured(parsed, config, path)
        return f"{clean(path, 200)}, {len(parsed.falsifiers)} falsifiers"

    def student() -> str:
        if host is not None and ON_HOST.match(source):
            return f"{clean(source, 200)}, looked at there"
        found["student"] = inspect_model_dir(resolve_builtin(source), "student", need_weights=not random)
        return _model(source, found["student"]) + (", random weights" if random else "")

    def teacher() -> str:
        if config.teacher is None:
            return "none: plain training"
        if host is not None and ON_HOST.match(config.teacher.path):
            return f"{clean(config.teacher.path, 200)}, looked at there"
        found["teacher"] = inspect_model_dir(resolve_builtin(config.teacher.path), "teacher")
        return _model(config.teacher.path, found["teacher"])

    def data() -> str:
        check(config, host)
        return ", ".join(clean(path, 200) for path in config.data.paths)

    checks = [_run("contract", contract), _run("teacher", teacher), _run("student", student)]
    if len(found) == 2:
        checks.append(_vocabulary(found["teacher"], found["student"]))
    if host is None and (missing := missing_store(config)):
        checks.append(Check("stored teacher", "UNKNOWN", missing))
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


def gate_check(found: Gate) -> Check:
    """What the gate says as a check."""
    told = clean(found.told(time.time()), 2000)
    if found.smoke is not None:
        return Check(SMOKE, "PASS", told)
    if found.needed:
        return Check(SMOKE, "FAIL", f"{told}; a smoke is a minute: mode smoke, then Start", forcible=True)
    return Check(SMOKE, "UNKNOWN", told)


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
