"""RunConfig: the one schema of what decides a result; YAML, variables and options in, every problem named.

Precedence: option > `KDCONSOLE_…` variable > file (or template) > default. Defaults are the production values; those of
a smoke stand in the template `builtin` only, so that they cannot leak into a long run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import msgspec.inspect

from engine.config_sources import Settings, from_command, from_options, from_text, from_variables
from engine.errors import ConfigError
from engine.schema import Problem, Source, Walker, key_paths, show
from engine.sections import (
    Checkpoint,
    Contract,
    Data,
    Distill,
    Evaluate,
    Prepare,
    RunConfig,
    Smoke,
    Student,
    Supervise,
    Teacher,
    Train,
)
from engine.text import clean
from engine.yaml_io import STDIN, dump_yaml, parse_yaml, read_text, source_name

__all__ = [
    "TEMPLATES",
    "Checkpoint",
    "ConfigProblems",
    "Contract",
    "Data",
    "Distill",
    "Evaluate",
    "Prepare",
    "RunConfig",
    "Smoke",
    "Student",
    "Supervise",
    "Teacher",
    "Train",
    "fingerprint",
    "gate_fingerprint",
    "load_config",
    "parse_config",
    "parse_yaml",
    "template",
    "to_yaml",
]

TEMPLATES: Final = ("builtin", "gx10")
MAX_PROBLEMS: Final = 20
"""Problems listed in one error; the rest is counted."""

_SCHEMA = msgspec.inspect.type_info(RunConfig)
_KEYS = tuple(key_paths(_SCHEMA))
_SHORTHANDS = {"teacher": Teacher.kd_shorthand, "student": Student.kd_shorthand, "contract": Contract.kd_shorthand}
_ALIASES = {
    "batch_size": "train.batch",
    "checkpoint_every": "checkpoint.every_steps",
    "dataset": "data.path",
    "dataset_dir": "data.path",
    "dtype": "train.precision",
    "gradient_accumulation_steps": "train.accumulation",
    "kd_alpha": "distill.alpha",
    "kd_temperature": "distill.temperature",
    "lr": "train.learning_rate",
    "max_grad_norm": "train.clip",
    "max_seq_length": "train.sequence",
    "min_lr": "train.min_learning_rate",
    "seq_len": "train.sequence",
    "sequence_length": "train.sequence",
    "student_init": "student.path",
    "teacher_apr": "teacher.path",
    "temperature": "distill.temperature",
}
"""Names that other trainers and the predecessor's records use."""
_LATER: Final[Mapping[str, Mapping[str, object]]] = {
    "teacher": {"source": "online", "cache": None, "top_k": 256},
    "train": {
        "compile": "auto",
        "activation_checkpointing": False,
        "prefetch": 2,
        "devices": 1,
        "parallel": "auto",
    },
    "prepare": {"shard_mib": 256, "min_mass": 0.8, "check_batches": 4},
    "evaluate": msgspec.to_builtins(Evaluate()),
}
"""Keys that came after the first runs: with these values they are left out of a fingerprint, so that a run that was
made before there were such keys keeps the one that its evidence states."""


class ConfigProblems(ConfigError):
    """All that is wrong with a configuration; the text has one line a problem.

    Args:
        problems: at least one; sorted here by source and line.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.order)
        lines = [str(problem) for problem in self.problems[:MAX_PROBLEMS]]
        if len(self.problems) > MAX_PROBLEMS:
            lines.append(f"and {len(self.problems) - MAX_PROBLEMS} more problems")
        super().__init__("\n".join(lines))


def load_config(
    file: Path | None = None,
    *,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    template: str | None = None,
    overrides: Mapping[str, object] | None = None,
    options: Mapping[str, str] | None = None,
) -> RunConfig:
    """Read, merge and check a configuration; relative paths come out absolute.

    Args:
        file: YAML file, its relative paths starting from its directory; `-` is standard input.
        sets: `KEY=VALUE` options such as `train.steps=500`, in order; relative paths start from the working directory.
        environ: variables; those named `KDCONSOLE_<SECTION>__<KEY>` (or `KDCONSOLE_<SECTION>`) are taken.
        template: name of the template to start from where no file is given.
        overrides: full key path to value, from a command's own options; they win over `sets`. None: not given.
        options: how messages name an override, by its key path, such as `--max-steps`.

    Raises:
        ConfigError: anything wrong; `ConfigProblems` names all of it.
    """
    here = Path.cwd()
    if file is not None:
        base = here if file == STDIN else Path(os.path.abspath(file)).parent
        settings = from_text(read_text(file), source_name(file), base, _SHORTHANDS)
    elif template is not None:
        settings = from_text(_template_text(template), f"template {template}", here, _SHORTHANDS)
    else:
        settings = Settings({}, Source("configuration", here), _SHORTHANDS)
    settings.put_all(from_variables(environ or {}, _KEYS, here))
    settings.put_all(from_options(sets, here))
    settings.put_all(from_command(overrides or {}, options or {}, here))
    return _checked(settings)


def parse_config(text: str, *, source: str = "configuration", base: Path | None = None) -> RunConfig:
    """Check a YAML text by itself.

    Args:
        text: YAML.
        source: how error messages call it.
        base: absolute directory that relative paths start from; the working directory by default.

    Raises:
        ConfigError: anything wrong; `ConfigProblems` names all of it.
    """
    return _checked(from_text(text, source, base or Path.cwd(), _SHORTHANDS))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, every key in the schema's order; `parse_config` reads the same one back."""
    return dump_yaml(msgspec.to_builtins(config))


def fingerprint(config: RunConfig) -> str:
    """SHA-256 in hex over the whole configuration; the same however its values were written."""
    return _digest(_canonical(config))


def gate_fingerprint(config: RunConfig) -> str:
    """SHA-256 in hex over what a smoke and its production run have in common.

    Left out: mode, train.steps, train.max_steps, train.prefetch, teacher.cache, smoke.*, prepare.*, evaluate.*,
    checkpoint.* and supervise.*.
    """
    tree = _canonical(config)
    for section in ("mode", "smoke", "checkpoint", "supervise", "prepare", "evaluate"):
        tree.pop(section, None)
    for key in ("steps", "max_steps", "prefetch"):
        tree["train"].pop(key, None)
    if tree["teacher"]:
        tree["teacher"].pop("cache", None)
    return _digest(tree)


def template(name: str) -> str:
    """A commented YAML configuration to start from, one of `TEMPLATES`.

    Raises:
        ConfigError: no template has the name.
    """
    return _template_text(name)


def _template_text(name: str) -> str:
    if name not in TEMPLATES:
        raise ConfigError(f"template {clean(name, 80)}: unknown", expected=" or ".join(TEMPLATES))
    return (Path(__file__).parent / "assets" / "templates" / f"{name}.yaml").read_text(encoding="utf-8")


def _canonical(config: RunConfig) -> dict[str, dict[str, object]]:
    # Converted twice: integers that code gave to float fields become floats, so that 1 and 1.0 are one value.
    tree: dict[str, dict[str, object]] = msgspec.to_builtins(msgspec.convert(msgspec.to_builtins(config), RunConfig))
    for section, defaults in _LATER.items():
        for key, default in defaults.items():
            if tree[section] and tree[section][key] == default:
                del tree[section][key]
    for section in ("prepare", "evaluate"):
        if not tree[section]:
            del tree[section]
    return tree


def _digest(tree: Mapping[str, object]) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(f"kdconsole-config-1\n{text}".encode()).hexdigest()


def _checked(settings: Settings) -> RunConfig:
    walker = Walker(settings.source, _KEYS, _ALIASES)
    walker.problems += settings.problems
    tree = walker.check(settings.tree, _SCHEMA)
    if not walker.problems:
        config = _simplest(msgspec.convert(tree, RunConfig))
        for path, value, text in _contradictions(config):
            origin = "" if settings.has(path) else " by default"
            walker.add(path, f"{show(value)}{origin}: expected {text}")
        if not walker.problems:
            return config
    raise ConfigProblems(walker.problems)


def _simplest(config: RunConfig) -> RunConfig:
    # One path in a list is the path alone: two spellings of one configuration have one fingerprint.
    if isinstance(config.data.path, list) and len(config.data.path) == 1:
        return msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, path=config.data.path[0]))
    return config


def _contradictions(config: RunConfig) -> Iterator[tuple[str, object, str]]:
    """Full key path, its value and what was expected, for values that are right alone and wrong together."""
    student, train, glob = config.student, config.train, config.data.glob
    if config.teacher is None and config.distill.alpha != 1.0 and (config.makes_steps or config.mode == "prepare"):
        yield "teacher", None, f"a model, unless distill.alpha is 1 (it is {config.distill.alpha})"
    if student.path is None and student.from_ is None:
        yield "student", {}, "one of its keys path and from"
    if student.path is not None and student.from_ is not None:
        yield "student.from", student.from_, "no student.path beside it; give one of the two"
    if student.layers is not None and student.from_ is None:
        yield "student.layers", student.layers, "student.from beside it, the model that the layers are taken from"
    if student.layers is not None and student.layers != sorted(set(student.layers)):
        yield "student.layers", student.layers, "ascending layer numbers, each once"
    if student.init == "random" and student.from_ is not None:
        yield "student.init", student.init, "pretrained or auto with student.from, whose weights are kept"
    if train.accumulation != "auto" and train.accumulation * train.devices > train.batch:
        share = f", divided among train.devices ({train.devices})" if train.devices > 1 else ""
        yield "train.accumulation", train.accumulation, f"at most train.batch ({train.batch}){share}"
    if train.batch % train.devices:
        yield "train.devices", train.devices, f"a divisor of train.batch ({train.batch})"
    if config.mode == "prepare" and (config.teacher is None or config.teacher.source == "online"):
        source = None if config.teacher is None else config.teacher.source
        yield "teacher.source", source, "hidden or topk: what is to be prepared"
    if config.mode == "evaluate" and config.evaluate.runs_code and not config.evaluate.run_generated_code:
        yield "evaluate.run_generated_code", False, "--run-generated-code: the answers of this suite are programs"
    if config.evaluate.samples > 1 and config.evaluate.temperature == 0:
        yield (
            "evaluate.samples",
            config.evaluate.samples,
            "1 with evaluate.temperature 0: greedy answers are the same",
        )
    if train.min_learning_rate > train.learning_rate:
        limit = train.learning_rate
        yield "train.min_learning_rate", train.min_learning_rate, f"at most train.learning_rate ({limit})"
    if train.warmup_steps >= train.steps:
        yield "train.warmup_steps", train.warmup_steps, f"less than train.steps ({train.steps})"
    if config.smoke.warmup_steps >= train.steps:
        yield "smoke.warmup_steps", config.smoke.warmup_steps, f"less than train.steps ({train.steps})"
    for key, most in (("smoke.max_steps", config.smoke.max_steps), ("train.max_steps", train.max_steps)):
        if most is not None and most > train.steps:
            yield key, most, f"at most train.steps ({train.steps})"
    if glob.startswith(("/", "~")) or ".." in glob.split("/"):
        yield "data.glob", glob, "a pattern below data.path, such as **/*.txt"
