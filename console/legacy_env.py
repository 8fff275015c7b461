"""The old launch scripts' variables, taken only with --legacy-env: what each becomes, or why it does not.

Precedence: option > `KDCONSOLE_…` variable > one of these > file > default. Nothing is passed over without a word.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from dispatch.hosts import Host, Hosts
from engine.config import ConfigProblems
from engine.config_sources import RESERVED_VARIABLES, VARIABLE_PREFIX
from engine.errors import ConfigError
from engine.schema import ON_HOST, Problem, show
from engine.text import clean

Mode = Literal["smoke", "train"]

KEYS: Final = {
    "TEACHER_REPO": "teacher",
    "STUDENT_INIT": "student",
    "STEPS": "train.steps",
    "BATCH_SIZE": "train.batch",
    "LR": "train.learning_rate",
    "T": "distill.temperature",
    "ALPHA": "distill.alpha",
    "APR_DISTILL_MAX_STEPS": "{mode}.max_steps",
    "APR_DISTILL_PROJECT_TO_STEPS": "smoke.project_to",
    "APR_DISTILL_CHECKPOINT_EVERY": "checkpoint.every_steps",
}
"""The key of the configuration that each variable sets."""
OPTIONS: Final = {"GX10_HOST": "--host", "EVIDENCE_DIR": "--evidence", "DRY_RUN": "--dry-run"}
"""The option that each variable stands for."""
HOST_KEYS: Final = {"GX10_USER": "user", "GX10_RUN_PREFIX": "run_dir"}
"""The key of hosts.yaml that says what each variable said; it is compared and not taken."""
NOTHING: Final = {
    "GX10_REPO_PATH": "the engine of this installation is put on the host by itself, below run_dir of hosts.yaml",
    "APR_DISTILL_LOG_EVERY": "every step stands in the stream",
}
"""Variables that stand for nothing here, and why."""
NAMES: Final = (
    *("GX10_HOST", "GX10_USER", "GX10_REPO_PATH", "GX10_RUN_PREFIX", "TEACHER_REPO", "STUDENT_INIT"),
    *("STEPS", "BATCH_SIZE", "LR", "T", "ALPHA", "EVIDENCE_DIR", "DRY_RUN", "APR_DISTILL_MAX_STEPS"),
    *("APR_DISTILL_PROJECT_TO_STEPS", "APR_DISTILL_CHECKPOINT_EVERY", "APR_DISTILL_LOG_EVERY"),
)
"""All of them, in the order in which they are told."""
TRUE: Final = ("1", "true", "yes", "on")
FALSE: Final = ("0", "false", "no", "off")
NOT_IN_A_SMOKE: Final = {"APR_DISTILL_CHECKPOINT_EVERY": "a smoke saves no checkpoint"}
NOT_IN_A_TRAINING: Final = {"APR_DISTILL_PROJECT_TO_STEPS": "a training projects to its own last step"}

_MODELS: Final = ("TEACHER_REPO", "STUDENT_INIT")
_REPO_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION: Final = re.compile(r"[0-9a-f]{7,64}")


@dataclass(frozen=True)
class Legacy:
    """What became of the variables."""

    told: tuple[str, ...]
    """One line for each variable that is set, for standard error."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """`KDCONSOLE_…` variables with the same meaning, which lie below the operator's own ones."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Which of the old variables each of those comes from."""
    host: str | None = None
    evidence: Path | None = None
    dry_run: bool = False

    def renamed(self, error: ConfigProblems) -> ConfigProblems:
        """The same problems, those of a translated variable under the name that the operator gave."""
        return ConfigProblems([self._renamed(problem) for problem in error.problems])

    def _renamed(self, problem: Problem) -> Problem:
        for ours, theirs in self.names.items():
            if problem.where == ours or problem.where.startswith(f"{ours}: "):
                return Problem(theirs + problem.where[len(ours) :], problem.text, problem.order)
        return problem


def read_legacy(
    environ: Mapping[str, str], mode: Mode, given: Mapping[str, str], host: str | None, hosts: Hosts
) -> Legacy:
    """Translates the old variables that are set.

    Args:
        environ: all variables.
        mode: of the run.
        given: what the operator gave as an option, and how messages call that: `train.steps` or `--evidence`, as
            `--set train.steps` or `--evidence`.
        host: what `--host` says.
        hosts: the hosts' file.

    Raises:
        ConfigError: a value that can mean nothing here; names the variable.
    """
    given = _with_variables(given, environ) | ({"--host": "--host"} if host else {})
    where = _host_of(environ, host, hosts)
    told: list[str] = []
    variables: dict[str, str] = {}
    names: dict[str, str] = {}
    options: dict[str, str] = {}
    for name in NAMES:
        value = environ.get(name)
        if value is None:
            continue
        value, shown = value.strip(), f"{name}={clean(value, 200)}"
        key = KEYS.get(name, OPTIONS.get(name, "")).format(mode=mode)
        if why := _passed_over(name, value, key, mode, given):
            told.append(f"{shown}: {why}")
        elif name in HOST_KEYS:
            told.append(f"{shown}: {_about_host(HOST_KEYS[name], value, where)}")
        elif name in OPTIONS:
            options[name] = value
            told.append(f"{shown} -> {_option(name, value)}")
        else:
            meant, how = _model(name, value, environ) if name in _MODELS else (value, "")
            ours = _variable(key)
            variables[ours], names[ours] = json.dumps(meant) if name in _MODELS else meant, name
            told.append(f"{shown} -> {key}={clean(meant, 300)}{how}")
    evidence = options.get("EVIDENCE_DIR")
    return Legacy(
        tuple(told),
        variables,
        names,
        options.get("GX10_HOST"),
        None if evidence is None else Path(os.path.expanduser(evidence)),
        options.get("DRY_RUN", "").lower() in TRUE,
    )


def _variable(key: str) -> str:
    return VARIABLE_PREFIX + key.upper().replace(".", "__")


def _with_variables(given: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """What is given by options, and by our own variables, which come before the old ones too."""
    ours = {
        name.removeprefix(VARIABLE_PREFIX).lower().replace("__", "."): name
        for name in environ
        if name.startswith(VARIABLE_PREFIX) and name not in RESERVED_VARIABLES
    }
    if environ.get("KDCONSOLE_EVIDENCE"):
        ours["--evidence"] = "KDCONSOLE_EVIDENCE"
    return {**ours, **given}


def _passed_over(name: str, value: str, key: str, mode: Mode, given: Mapping[str, str]) -> str:
    """Why a variable is not taken; empty when it is."""
    if not value:
        return "empty, so passed over"
    if name in NOTHING:
        return f"has no equivalent: {NOTHING[name]}"
    if why := (NOT_IN_A_SMOKE if mode == "smoke" else NOT_IN_A_TRAINING).get(name):
        return f"passed over: {why}"
    if key:
        for each, called in given.items():
            # `--set teacher.path=…` and `--set student=…` are about the same model as the variable.
            if each == key or each.startswith(f"{key}.") or key.startswith(f"{each}."):
                return f"passed over: {called} is given"
    return ""


def _option(name: str, value: str) -> str:
    if name != "DRY_RUN":
        return f"{OPTIONS[name]} {clean(value, 300)}"
    if value.lower() not in (*TRUE, *FALSE):
        raise ConfigError(f"DRY_RUN: {show(value)}", expected="1 or 0")
    return "--dry-run" if value.lower() in TRUE else "no --dry-run"


def _host_of(environ: Mapping[str, str], option: str | None, hosts: Hosts) -> Host | None:
    """The host that the run goes to."""
    if option is not None:
        return hosts.named(option)
    name = environ.get("GX10_HOST", "").strip()
    if not name:
        return None
    try:
        return hosts.named(name)
    except ConfigError:
        raise ConfigError(
            f"GX10_HOST: {show(name)}: no host's name",
            expected="a name of hosts.yaml or ssh_config, such as gx10",
            do="kdconsole hosts add NAME --address A --user U makes one",
        ) from None


def _about_host(key: str, value: str, host: Host | None) -> str:
    """What counts in the place of a variable that says how a host is used."""
    if host is None:
        return "not taken: the run stays on this machine"
    if key == "user":
        from dispatch.ssh_route import place_of

        says, where = place_of(host).user, f"`user` of {host.name} in hosts.yaml, else ssh_config"
    else:
        says, where = host.run_dir, f"`{key}` of {host.name} in hosts.yaml"
    if says.rstrip("/") == value.rstrip("/"):
        return f"says what counts here too: {where}"
    return f"not taken: {where} counts, and that is {clean(says, 200)}"


def _model(name: str, value: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The model that a variable means, and a word on how it was found.

    Raises:
        ConfigError: there is none of that name on this machine; nothing is downloaded.
    """
    if value.startswith("builtin:") or ON_HOST.match(value):
        return value, ""
    path = Path(os.path.abspath(os.path.expanduser(value)))
    if path.exists():
        return str(path), ""
    shown = clean(value, 200)
    if not _REPO_ID.fullmatch(value):
        raise ConfigError(f"{name}: {shown}: no such directory", expected="a model directory")
    cache = hub_cache(environ)
    snapshot = _snapshot(cache, value)
    if snapshot is not None:
        return str(snapshot), ", from the cache of Hugging Face"
    option = "--teacher" if name == "TEACHER_REPO" else "--student"
    raise ConfigError(
        f"{name}: {shown}: no directory here, nor in the cache of Hugging Face, {clean(str(cache), 200)}",
        expected="a model directory, for nothing is downloaded",
        do=f"hf download {shown} fetches it; one that is on the host is {option} HOST:/path",
    )


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face's tools keep what they have downloaded."""
    if given := environ.get("HF_HUB_CACHE"):
        return Path(os.path.expanduser(given))
    home = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(home), "hub")


def _snapshot(cache: Path, repo: str) -> Path | None:
    """The directory of a repository's main branch in the cache."""
    kept = cache / f"models--{repo.replace('/', '--')}"
    try:
        revision = (kept / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    found = kept / "snapshots" / revision
    return found if _REVISION.fullmatch(revision) and found.is_dir() else None
