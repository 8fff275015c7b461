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
from typing import Annotated, ClassVar, Final, Literal

import msgspec
import msgspec.inspect
from msgspec import Meta, field

from engine.config_sources import Settings, from_command, from_options, from_text, from_variables
from engine.errors import ConfigError
from engine.schema import BUILTIN, Problem, Source, Walker, key_paths, show
from engine.text import clean
from engine.yaml_io import STDIN, dump_yaml, parse_yaml, read_text, source_name

__all__ = [
    "TEMPLATES",
    "Checkpoint",
    "ConfigProblems",
    "Contract",
    "Data",
    "Distill",
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

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Momentum = Annotated[float, Meta(ge=0, lt=1)]
ModelPath = Annotated[
    str,
    Meta(
        min_length=1,
        description="a model directory, builtin:teacher or builtin:student",
        extra={BUILTIN: ("builtin:teacher", "builtin:student")},
    ),
]
DataPath = Annotated[
    str, Meta(min_length=1, description="a path or builtin:stdlib", extra={BUILTIN: ("builtin:stdlib",)})
]
TokenizerPath = Annotated[
    str, Meta(min_length=1, description="a tokenizer directory or builtin", extra={BUILTIN: ("builtin",)})
]
ContractPath = Annotated[str, Meta(min_length=1, description="a YAML file or builtin", extra={BUILTIN: ("builtin",)})]
DataPaths = Annotated[list[DataPath], Meta(min_length=1, description="a list of them")]
Layers = Annotated[list[Whole], Meta(min_length=1, description="a list of layer numbers, the first being 0")]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the configuration; unknown keys are errors."""


class Teacher(Section, frozen=True, kw_only=True):
    """The model that is imitated; a plain text is short for `{path: …}`."""

    kd_shorthand: ClassVar[str] = "path"
    path: ModelPath


class Student(Section, frozen=True, kw_only=True, rename={"from_": "from"}):
    """The model that is trained; a plain text is short for `{path: …}`. Exactly one of `path` and `from_` is given."""

    kd_shorthand: ClassVar[str] = "path"
    path: ModelPath | None = None
    init: Literal["auto", "pretrained", "random"] = "auto"
    """auto: random for builtin:student, pretrained for everything else."""
    from_: ModelPath | None = None
    """`from` in YAML: the model that `layers` are taken from."""
    layers: Layers | None = None
    """Layers of `from_` to keep, ascending; all of them when None."""

    @property
    def source(self) -> str:
        """The model that it comes from: its own directory, or the one that its layers are taken from."""
        return self.path or self.from_ or ""

    @property
    def starts_random(self) -> bool:
        """Whether its weights are drawn and `config.json` is all that is read of the model."""
        return self.init == "random" or (self.init == "auto" and self.source == "builtin:student")


class Distill(Section, frozen=True, kw_only=True):
    """The loss: alpha CE + (1 - alpha) T² KL."""

    temperature: Annotated[float, Meta(gt=0, le=100)] = 4.0
    alpha: Annotated[float, Meta(ge=0, le=1)] = 0.3
    compile: Literal["auto", "on", "off"] = "auto"
    chunk_mib: Annotated[int, Meta(ge=1, le=4096)] = 64
    """MiB of one logits chunk of the fused loss."""


class Data(Section, frozen=True, kw_only=True):
    """The corpus. One path stands alone, several in a list."""

    path: DataPath | DataPaths
    glob: Annotated[str, Meta(min_length=1, description="a file pattern such as **/*.txt")] = "**/*.txt"
    tokenizer: TokenizerPath | None = None
    heldout_fraction: Annotated[float, Meta(gt=0, le=0.5)] = 0.05
    heldout_windows: Annotated[int, Meta(ge=1, le=4096)] = 64
    limit_bytes: Count | None = None
    """Take whole text files up to about this many bytes in all; None: everything."""

    @property
    def paths(self) -> list[str]:
        """The paths as a list, one or many."""
        return [self.path] if isinstance(self.path, str) else self.path


class Train(Section, frozen=True, kw_only=True):
    """The loop. A step takes `batch` windows of `sequence` tokens, in `accumulation` parts."""

    steps: Count = 50_000
    max_steps: Count | None = None
    """End a training run after this many, as completed; the schedule stays that of `steps`. Smokes have their own."""
    batch: Count = 16
    sequence: Annotated[int, Meta(ge=8, le=131_072)] = 512
    accumulation: Count = 1
    learning_rate: Positive = 1.5e-5
    min_learning_rate: NotNegative = 5e-7
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Whole = 500
    weight_decay: NotNegative = 0.01
    beta1: Momentum = 0.9
    beta2: Momentum = 0.95
    clip: NotNegative = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: Whole = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Count | None = None
    evaluate_every: Whole = 0
    """Steps between held-out evaluations; 0: before the first and after the last only."""


class Checkpoint(Section, frozen=True, kw_only=True):
    """When the state is saved."""

    every_steps: Whole = 5000
    """0 turns checkpoints off."""
    keep_last: Count = 2
    """Periodic checkpoints that stay; the newest, the best, the last interrupt and the final one stay besides."""


class Smoke(Section, frozen=True, kw_only=True):
    """The short rehearsal."""

    budget_seconds: Positive = 60.0
    max_steps: Count | None = None
    warmup_steps: Whole = 0
    """Takes the place of train.warmup_steps in a smoke."""
    project_to: Count = 50_000
    """Steps that the wall time is projected to."""


class Supervise(Section, frozen=True, kw_only=True):
    """What the supervisor on the host does about a run that makes no progress."""

    stall_seconds: Positive = 600.0
    """Without a step, or another sign of progress, for so long, and for 20 steps, all stacks go to launch.log."""
    kill_after_stall_seconds: Positive | None = None
    """End the run when a stall has lasted so long; None: only tell."""


class Contract(Section, frozen=True, kw_only=True):
    """The falsifiers; a plain text is short for `{path: …}`, `builtin` is the one that ships for the mode."""

    kd_shorthand: ClassVar[str] = "path"
    path: ContractPath = "builtin"


class RunConfig(Section, frozen=True, kw_only=True):
    """Everything that decides a run's result. `load_config` makes checked ones."""

    mode: Literal["train", "smoke"] = "train"
    teacher: Teacher | None
    """None only with distill.alpha 1, plain training without a teacher."""
    student: Student
    distill: Distill = field(default_factory=Distill)
    data: Data
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    smoke: Smoke = field(default_factory=Smoke)
    contract: Contract = field(default_factory=Contract)
    supervise: Supervise = field(default_factory=Supervise)

    @property
    def max_steps(self) -> int | None:
        """The number of steps that this mode was given to end after."""
        return self.smoke.max_steps if self.mode == "smoke" else self.train.max_steps

    @property
    def steps_asked(self) -> int:
        """Steps that the run makes if nothing ends it before."""
        return self.train.steps if self.max_steps is None else min(self.max_steps, self.train.steps)


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
}
"""Names that other trainers and the predecessor's records use."""


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

    Left out: mode, train.steps, train.max_steps, smoke.*, checkpoint.* and supervise.*.
    """
    tree = _canonical(config)
    for section in ("mode", "smoke", "checkpoint", "supervise"):
        del tree[section]
    for key in ("steps", "max_steps"):
        del tree["train"][key]
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
    if config.teacher is None and config.distill.alpha != 1.0:
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
    if train.accumulation > train.batch:
        yield "train.accumulation", train.accumulation, f"at most train.batch ({train.batch})"
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
