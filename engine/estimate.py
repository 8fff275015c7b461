"""What a run will need of memory and disk, row by row, before anything of it is loaded.

Looked at are the configuration, `config.json` and safetensors headers. Each row says how it was computed, so that an
operator who is refused can see what to lower. Rows add up to a little more than the true peak: they do not all stand
at their largest at the same moment.
"""

from __future__ import annotations

import msgspec

from engine.config import RunConfig
from engine.disk_rows import disk_rows
from engine.estimate_rows import Device, Pool, Row, total
from engine.formats import ModelFiles
from engine.memory_rows import Memory
from engine.shapes import shape_of

__all__ = ["Device", "Estimate", "Pool", "Row", "Shortage", "estimate"]


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
    settled: tuple[str, ...] = ()
    """What `auto` came to, for keys that depend on how much is free (see `engine.micro_batch.foresee`)."""

    @property
    def device_bytes(self) -> int:
        """Memory of the device; 0 where it is the host's."""
        return 0 if self.shared else total(self.memory, "device")

    @property
    def host_bytes(self) -> int:
        """Memory of the host, the device's included where they share it."""
        return total(self.memory, "host") + (total(self.memory, "device") if self.shared else 0)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the run writes and keeps, at most."""
        return total(self.disk, "disk")

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
    corpus_tokens: int | None = None,
) -> Estimate:
    """Estimate what a run needs.

    Args:
        config: of the run.
        teacher: as `inspect_model_dir` found it; None where there is none.
        student: the same of the student, or of the model that its layers come from.
        device: what will train; `auto` has to be resolved by the caller.
        shared: a GPU has no memory of its own.
        corpus_tokens: about so many are in the corpus, for what a preparation stores; None where nobody counted them.

    Raises:
        ModelError: a weight file's header cannot be read.
    """
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    theirs = None if teacher is None else shape_of(teacher)
    ours = shape_of(student, config.student.layers)
    memory = Memory(config, ours, theirs, precision == "bf16", device).rows()
    shapes = [("student", student, ours)] + ([("teacher", teacher, theirs)] if teacher and theirs else [])
    notes = [
        f"{role} of architecture {files.model_type}: parameters are {shape.source}"
        for role, files, shape in shapes
        if not shape.exact
    ]
    if config.makes_steps and config.train.devices > 1:
        notes.append(f"{config.train.devices} devices: their memory is told of one, the host's of all processes")
    if config.mode == "evaluate" and config.evaluate.runs_code:
        notes.append(_programs(config))
    return Estimate(
        device=device,
        shared=shared or device != "cuda",
        precision=precision,
        memory=tuple(row for row in memory if row.bytes),
        disk=tuple(disk_rows(config, ours, theirs, 2 if precision == "bf16" else 4, corpus_tokens)),
        notes=tuple(notes),
    )


def _programs(config: RunConfig) -> str:
    """What comes on top while answers are run; no row, since hardly one takes what it may."""
    asked = config.evaluate
    many = "one for each processor" if asked.workers is None else f"{asked.workers:,}"
    return f"answers being run come on top: {many} at a time, each of at most {asked.memory_mib:,} MiB, most of 20"
