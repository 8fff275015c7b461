"""The sections of a configuration: every key with its type, its bounds and its default, the production value.

`engine.config` reads, checks and writes them; a key that was added after the first runs belongs in its `_LATER` too.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta, field

from engine.schema import BUILTIN

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
CachePath = Annotated[
    str,
    Meta(min_length=1, description="a directory of the machine that trains", extra={BUILTIN: ()}),
]
SUITES = ("heldout", "humaneval")
"""Suites by name; every other one is a file of problems."""
SuitePath = Annotated[
    str,
    Meta(
        min_length=1,
        description="heldout, humaneval or a file of problems",
        extra={BUILTIN: SUITES},
    ),
]
Layers = Annotated[list[Whole], Meta(min_length=1, description="a list of layer numbers, the first being 0")]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the configuration; unknown keys are errors."""


class Teacher(Section, frozen=True, kw_only=True):
    """The model that is imitated; a plain text is short for `{path: …}`."""

    kd_shorthand: ClassVar[str] = "path"
    path: ModelPath
    source: Literal["online", "hidden", "topk"] = "online"
    """Where its part of the loss comes from: a forward pass in every step, or what `kdconsole prepare` stored of it."""
    cache: CachePath | None = None
    """Where that is stored, on the machine that trains; None: `kdconsole/teacher` below the user's cache directory."""
    top_k: Annotated[int, Meta(ge=1, le=65_536)] = 256
    """Logits a token that are stored with source `topk`."""


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
    accumulation: Count | Literal["auto"] = 1
    """auto: as few parts as fit in the memory that is free when the run begins; a resumed run keeps their number."""
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
    compile: Literal["auto", "on", "off"] = "auto"
    """Run teacher and student through torch.compile; auto: on a GPU. The loss has its own key, distill.compile."""
    activation_checkpointing: bool = False
    """Keep a layer's input alone and compute the layer again in the backward pass: less memory, a third more work."""
    prefetch: Annotated[int, Meta(ge=0, le=64)] = 2
    """Batches that a thread makes ready ahead of the step that takes them."""
    devices: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Processes that train together, one a GPU; the batch is divided among them."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several devices: whole models on each (ddp) or divided among them (fsdp); auto: ddp where they fit."""
    evaluate_every: Whole = 0
    """Steps between held-out evaluations; 0: before the first and after the last only."""

    @property
    def parts(self) -> int:
        """`accumulation` as a number; auto counts as 1 until it is replaced by one (see `engine.micro_batch`)."""
        return 1 if self.accumulation == "auto" else self.accumulation


class Prepare(Section, frozen=True, kw_only=True):
    """How `kdconsole prepare` stores the teacher."""

    shard_mib: Annotated[int, Meta(ge=1, le=65_536)] = 256
    """About the size of one file."""
    min_mass: Annotated[float, Meta(ge=0, le=1)] = 0.8
    """With source `topk`: the least mean share of the probability that the stored logits must hold; 0 takes any."""
    check_batches: Count = 4
    """Random batches that are computed again and held against what was stored."""


class Evaluate(Section, frozen=True, kw_only=True):
    """What `kdconsole evaluate` asks of a trained student, and how its generated code may run."""

    suite: SuitePath = "heldout"
    """heldout: losses on the held-out part; humaneval or a JSONL file of its form: programs that solve problems."""
    limit: Count | None = None
    """The first so many problems alone; None: all of them."""
    samples: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Completions a problem."""
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.0
    """Of sampling; 0 takes the likeliest token always (greedy)."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Meta(ge=1, le=32_768)] = 512
    batch: Annotated[int, Meta(ge=1, le=4096)] = 16
    """Completions that are generated together."""
    seed: Whole = 0
    run_generated_code: bool = False
    """Set by --run-generated-code and by nothing else; without it no problem suite starts."""
    workers: Count | None = None
    """Programs that run at a time; None: one a processor."""
    wall_seconds: Positive = 15.0
    """Of one program, from start to end."""
    cpu_seconds: Count = 5
    memory_mib: Annotated[int, Meta(ge=64, le=65_536)] = 512
    """Address space of one program."""

    @property
    def runs_code(self) -> bool:
        """Whether the suite is one of problems, whose answers are programs."""
        return self.suite != "heldout"


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

    mode: Literal["train", "smoke", "prepare", "evaluate", "publish"] = "train"
    teacher: Teacher | None
    """None only with distill.alpha 1, plain training without a teacher."""
    student: Student
    distill: Distill = field(default_factory=Distill)
    data: Data
    train: Train = field(default_factory=Train)
    prepare: Prepare = field(default_factory=Prepare)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    smoke: Smoke = field(default_factory=Smoke)
    contract: Contract = field(default_factory=Contract)
    supervise: Supervise = field(default_factory=Supervise)

    @property
    def makes_steps(self) -> bool:
        """Whether its mode trains at all."""
        return self.mode in ("train", "smoke")

    @property
    def max_steps(self) -> int | None:
        """The number of steps that this mode was given to end after."""
        return self.smoke.max_steps if self.mode == "smoke" else self.train.max_steps

    @property
    def steps_asked(self) -> int:
        """Steps that the run makes if nothing ends it before."""
        return self.train.steps if self.max_steps is None else min(self.max_steps, self.train.steps)
