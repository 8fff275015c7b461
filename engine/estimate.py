"""What a run will need of memory and disk, row by row, before anything of it is loaded.

Looked at are the configuration, `config.json` and safetensors headers. Each row says how it was computed, so that an
operator who is refused can see what to lower. Rows add up to a little more than the true peak: they do not all stand
at their largest at the same moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from engine.config import RunConfig
from engine.formats import ModelFiles
from engine.shapes import Shape, shape_of

Device = Literal["cpu", "cuda", "mps"]
Pool = Literal["device", "host", "disk"]


MIB, GIB = 1 << 20, 1 << 30
_CPU_FRAMEWORK = 450 * MIB
_CUDA_HOST_FRAMEWORK = 3 * GIB
_DEVICE_FRAMEWORK = 1 * GIB
_STEP_BYTES = 700
"""Of one step in the stream and in launch.log, with heartbeats and vitals where it takes a few seconds."""
_FIXED_LOG = 8 * MIB
_EVALUATION_CHUNKS = 9
"""Buffers of one chunk of logits in the plain reference loss that evaluates."""
_WHOLE_LOGITS = 11
"""The same in the plain loss that trains where a head is more than one product, its gradients included."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that takes room."""

    name: str
    bytes: int
    where: Pool
    how: str
    """How the bytes were computed, in words."""


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """One pool that has less than what is needed."""

    where: Pool
    needed: int
    free: int


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Memory and disk of a run.

    `shared` says that device and host rows stand in one memory: on the CPU, on Apple's chips and where a GPU shares
    the host's.
    """

    device: Device
    shared: bool
    precision: str
    memory: tuple[Row, ...]
    disk: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Memory of the device; 0 where it is the host's."""
        return 0 if self.shared else _sum(self.memory, "device")

    @property
    def host_bytes(self) -> int:
        """Memory of the host, the device's included where they share it."""
        return _sum(self.memory, "host") + (_sum(self.memory, "device") if self.shared else 0)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the run writes and keeps, at most."""
        return _sum(self.disk, "disk")

    def fits(self, free_device: int | None, free_host: int | None, free_disk: int | None) -> list[Shortage]:
        """The pools that have too little; None is a figure that nobody could tell, and no shortage."""
        pools: tuple[tuple[Pool, int, int | None], ...] = (
            ("device", self.device_bytes, free_device),
            ("host", self.host_bytes, free_host),
            ("disk", self.disk_bytes, free_disk),
        )
        return [
            Shortage(where=where, needed=needed, free=free)
            for where, needed, free in pools
            if free is not None and needed > free
        ]


def estimate(
    config: RunConfig,
    teacher: ModelFiles | None,
    student: ModelFiles,
    *,
    device: Device,
    shared: bool = False,
) -> Estimate:
    """Estimate what a run needs.

    Args:
        config: of the run.
        teacher: as `inspect_model_dir` found it; None where there is none.
        student: the same of the student, or of the model that its layers come from.
        device: what will train; `auto` has to be resolved by the caller.
        shared: a GPU has no memory of its own.

    Raises:
        ModelError: a weight file's header cannot be read.
    """
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    theirs = None if teacher is None else shape_of(teacher)
    ours = shape_of(student, config.student.layers)
    part = _Part(config, ours, theirs, precision == "bf16", device)
    memory = [*part.weights(), *part.working()]
    memory += part.host(snapshot=config.mode == "train", working=_total(memory))
    shapes = [("student", student, ours)] + ([("teacher", teacher, theirs)] if teacher and theirs else [])
    notes = [
        f"{role} of architecture {files.model_type}: parameters are {shape.source}"
        for role, files, shape in shapes
        if not shape.exact
    ]
    return Estimate(
        device=device,
        shared=shared or device != "cuda",
        precision=precision,
        memory=tuple(row for row in memory if row.bytes),
        disk=tuple(_disk(config, ours)),
        notes=tuple(notes),
    )


class _Part:
    """The rows of memory; sizes that several of them need stand here once."""

    def __init__(self, config: RunConfig, student: Shape, teacher: Shape | None, mixed: bool, device: Device) -> None:
        self.config, self.student, self.teacher, self.mixed = config, student, teacher, mixed
        self.on_gpu = device == "cuda"
        self.where: Pool = "host" if device == "cpu" else "device"
        train = config.train
        self.windows = -(-train.batch // train.accumulation)
        self.tokens = self.windows * train.sequence
        self.wide = 2 if mixed else 4
        self.size = f"{self.windows} x {train.sequence} tokens"

    def weights(self) -> list[Row]:
        """What is there from the first step to the last."""
        p = self.student.parameters
        said = f"{_count(p)} parameters ({self.student.source})"
        rows = [
            self._row("student weights", 4 * p, f"{said} x 4 bytes, float32"),
            self._row("gradients", 4 * p, f"{_count(p)} x 4 bytes, float32"),
            self._row("AdamW moments", 8 * p, f"{_count(p)} x 2 moments x 4 bytes"),
        ]
        if self.mixed:
            inner = max(0, p - self.student.embedding * (1 if self.student.tied else 2))
            rows.append(
                self._row("bf16 copies of weights", 2 * inner, f"{_count(inner)} x 2 bytes: all but embedding and head")
            )
        if self.teacher is not None:
            size = 2 if self.mixed else 4
            how = f"{_count(self.teacher.parameters)} ({self.teacher.source}) x {size} bytes"
            rows.append(self._row("teacher weights", size * self.teacher.parameters, how))
        return rows

    def working(self) -> list[Row]:
        """What a step makes and drops again."""
        s, t = self.student, self.teacher
        layer = _saved_bytes(s, self.mixed)
        kept = s.layers * layer * self.tokens
        rows = [
            self._row(
                "student activations",
                kept + 12 * s.hidden * self.tokens,
                f"{self.size} x {s.layers} layers x {layer:,} bytes (hidden {s.hidden:,}, feed-forward "
                f"{s.intermediate:,}, {s.heads} heads); no sequence x sequence matrix (SDPA)",
            )
        ]
        if t is not None:
            transient = _forward_bytes(t, self.wide) * self.tokens
            how = f"{self.size} x {_forward_bytes(t, self.wide):,} bytes: one layer at a time, without gradients"
            rows.append(self._row("teacher activations", transient, how))
        return [*rows, *self._loss(kept)]

    def _loss(self, activations: int) -> list[Row]:
        s, t, distill = self.student, self.teacher, self.config.distill
        if not (s.plain_head and (t is None or t.plain_head)):
            rows = max(s.vocab, t.vocab if t else 0)
            how = f"{self.size} x {rows:,} logits x 4 bytes x {_WHOLE_LOGITS}: a head is more than one product"
            return [self._row("whole logits", 4 * self.tokens * rows * _WHOLE_LOGITS, how)]
        chunk_tokens = max(1, min(self.tokens, (distill.chunk_mib * MIB) // (4 * s.vocab)))
        chunk = 4 * s.vocab * chunk_tokens
        compiled = distill.compile == "on" or (distill.compile == "auto" and self.on_gpu)
        buffers = 2 if compiled else 4
        # Evaluation keeps no activations, so that only what goes beyond them comes on top.
        evaluation = max(0, _EVALUATION_CHUNKS * chunk - buffers * chunk - activations)
        how = f"{buffers} x {chunk_tokens:,} tokens x {s.vocab:,} logits x 4 bytes" + (", compiled" if compiled else "")
        if evaluation:
            how += f"; {_EVALUATION_CHUNKS} of them when it is evaluated"
        head = 4 * s.embedding
        copies = 4 * s.vocab * t.hidden if self.mixed and t is not None else 0
        heads = f"the head's own gradient, {s.vocab:,} x {s.hidden:,} x 4 bytes"
        if copies:
            heads += f", and the teacher's head in float32, {s.vocab:,} x {t.hidden if t else 0:,} x 4 bytes"
        return [
            self._row("loss chunks", buffers * chunk + evaluation, how),
            self._row("heads in the loss", head + copies, heads),
        ]

    def host(self, *, snapshot: bool, working: int) -> list[Row]:
        """What stands in the host's memory wherever the run computes."""
        p = self.student.parameters
        rows = []
        if snapshot:
            saved, how = 12 * p, f"{_count(p)} x 3 x 4 bytes: weights and moments, written from here by a thread"
            if self.on_gpu:  # torch rounds what it pins
                saved, how = 1 << (saved - 1).bit_length(), f"{how}; pinned, so up to the next power of two"
            rows.append(Row(name="checkpoint snapshot", bytes=saved, where="host", how=how))
            # After training: the export's copy, and the fresh process that loads it.
            export = 6 * p + _CPU_FRAMEWORK
            extra = export if self.on_gpu else export - working + 16 * p
            how = f"{_count(p)} x (2 + 4) bytes and a second process that reads it back, after training"
            rows.append(Row(name="export and its check", bytes=max(0, extra), where="host", how=how))
        if self.on_gpu:
            loading = max(4 * p, 0 if self.teacher is None else self.wide * self.teacher.parameters)
            rest = max(0, loading - sum(row.bytes for row in rows))
            how = "the larger model in host memory, before it moves to the device; what the rows above leave of it"
            rows.append(Row(name="models being loaded", bytes=rest, where="host", how=how))
            rows.append(
                Row(
                    name="framework on the device",
                    bytes=_DEVICE_FRAMEWORK,
                    where="device",
                    how="an allowance: CUDA context, cuBLAS workspaces, what the allocator rounds up",
                )
            )
            how = "an allowance: Python, torch and transformers with CUDA's libraries"
            rows.append(Row(name="framework", bytes=_CUDA_HOST_FRAMEWORK, where="host", how=how))
        else:
            how = "Python, torch and transformers, 330 MiB as imported, and their thread pools"
            rows.append(Row(name="framework", bytes=_CPU_FRAMEWORK, where="host", how=how))
        return rows

    def _row(self, name: str, size: int, how: str) -> Row:
        return Row(name=name, bytes=size, where=self.where, how=how)


def _saved_bytes(s: Shape, mixed: bool) -> int:
    """Bytes a token that one layer keeps for the backward pass, without dropout and without recomputation.

    Counted from the operators of transformers' Llama and Qwen2 blocks, by the method of Korthikanti et al. (2022),
    arXiv:2205.05198, section 4.1. Per token, with hidden h, feed-forward i, query width q and key-value width k:

    - each of two norms keeps its input, the normalised input and its output: 6 h;
    - attention keeps query, key, value, output and one logarithm a head: 2 q + 2 k + heads;
    - a gated feed-forward part keeps gate, activated gate, way up and their product: 4 i (5 i for GPT-2's own gelu).

    In float32 each is 4 bytes. In mixed precision the residual stream and the norms stay in float32 (4 h of them), and
    each of the five products that follow keeps a bf16 copy of its input; the rest is 2 bytes.
    """
    inner = (4 if s.gated else 5) * s.intermediate
    attention = 2 * s.query + 2 * s.key_value
    if mixed:
        return 16 * s.hidden + 10 * s.hidden + 2 * (attention + inner) + 4 * s.heads
    return 4 * (6 * s.hidden + attention + inner + s.heads)


def _forward_bytes(t: Shape, size: int) -> int:
    """Bytes a token of a forward pass without gradients, at its widest: inside one layer's feed-forward part."""
    return size * (4 * t.hidden + (3 if t.gated else 2) * t.intermediate) + 4 * t.hidden


def _disk(config: RunConfig, student: Shape) -> Iterable[Row]:
    p, steps, every = student.parameters, config.steps_asked, config.checkpoint.every_steps
    if config.mode == "train":
        periodic = min(config.checkpoint.keep_last, steps // every) if every else 0
        count = periodic + 3
        yield Row(
            name="checkpoints",
            bytes=count * (12 * p + MIB),
            where="disk",
            how=f"{count} ({periodic} periodic, the best, the final, one being written) x {_count(p)} x 3 x 4 bytes",
        )
        yield Row(
            name="exported model", bytes=2 * p + 32 * MIB, where="disk", how=f"{_count(p)} x 2 bytes, and the tokenizer"
        )
    else:
        yield Row(
            name="checkpoint probe",
            bytes=min(12 * p, 256 * MIB + 4 * student.embedding),
            where="disk",
            how="written once to be timed, and deleted",
        )
    yield Row(
        name="stream and log",
        bytes=steps * _STEP_BYTES + _FIXED_LOG,
        where="disk",
        how=f"{steps:,} steps x {_STEP_BYTES} bytes",
    )


def _sum(rows: Iterable[Row], where: Pool) -> int:
    return sum(row.bytes for row in rows if row.where == where)


def _total(rows: Iterable[Row]) -> int:
    return sum(row.bytes for row in rows)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
