"""In how many parts a device takes its share of a step's batch, where `train.accumulation` is `auto`.

Fewer parts are faster and more parts need less memory; losses and weights are the same but for rounding. A run looks
once, as it begins, and keeps to the number that it found: a resumed run has the same sums in the same order. Needs no
torch.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from engine.config import RunConfig
from engine.estimate import Device, Estimate, estimate
from engine.formats import ModelFiles
from engine.stream import Run
from engine.vitals import proc_bytes

MARGIN: Final = 10
"""Of the free memory one part in so many is not planned with: activations are foreseen within a tenth, an allocator
does not find a place for every last byte, and other programs take what they need while a run goes on."""
UNIFIED_RESERVE: Final = 8
"""Of memory that GPU and host share, one part in so many stays free: what the GPU holds cannot be swapped out, and
a host under memory pressure hangs as a whole, sshd included."""

_MEMINFO, _STATUS = "/proc/meminfo", "/proc/self/status"


def resolve(
    config: RunConfig,
    teacher: ModelFiles | None,
    student: ModelFiles,
    *,
    device: Device,
    shared: bool,
    free_device: int | None,
    free_host: int | None,
    before: Run | None = None,
) -> RunConfig:
    """The configuration with a number for `train.accumulation: auto`; with several devices also a `train.parallel`.

    The number is the smallest that divides the device's share of the batch into equal parts and whose estimate leaves
    one part in `MARGIN` of the free memory; where none does, parts are single windows. Of several devices each has the
    whole models (ddp) where that fits in any number of parts. What the configuration says outright stays as it is.

    Args:
        config: of the run.
        teacher: as `inspect_model_dir` found it; None where there is none.
        student: the same of the student, or of the model that its layers come from.
        device: what will train.
        shared: a GPU has no memory of its own.
        free_device: bytes that are free on the device; None limits nothing.
        free_host: bytes that are free in the host's memory, but for those that are to stay so (see `free_host_bytes`);
            None limits nothing.
        before: the `run` event of the attempt that this one goes on from: its parts are kept (see `kept_parts`).

    Raises:
        ModelError: a weight file's header cannot be read.
    """
    train = config.train
    ways: tuple[Literal["auto", "ddp", "fsdp"], ...] = (train.parallel,)
    if train.devices > 1 and train.parallel == "auto":
        ways = ("ddp", "fsdp")
    numbers = [train.parts]
    if train.accumulation == "auto":
        numbers = equal_parts(share(config)) if before is None else [kept_parts(config, before)]
    choices = [_with(config, parts, way) for way in ways for parts in numbers]
    for choice in choices[:-1]:
        # A smoke takes what its run will take: it is there to be held against it.
        asked = msgspec.structs.replace(choice, mode="train") if choice.mode == "smoke" else choice
        needed = estimate(asked, teacher, student, device=device, shared=shared)
        if not needed.fits(_planned(free_device), _planned(free_host), None):
            return choice
    return choices[-1]


def foresee(
    config: RunConfig,
    teacher: ModelFiles | None,
    student: ModelFiles,
    *,
    device: Device,
    shared: bool,
    free_device: int | None,
    free_host: int | None,
    corpus_tokens: int | None = None,
) -> Estimate:
    """The estimate of a run as it would settle itself where so much is free, and what it would settle on.

    Args:
        config: of the run.
        teacher: as `inspect_model_dir` found it; None where there is none.
        student: the same of the student, or of the model that its layers come from.
        device: what will train.
        shared: a GPU has no memory of its own.
        free_device: as `resolve` takes it.
        free_host: as `resolve` takes it.
        corpus_tokens: as `estimate` takes it.

    Raises:
        ModelError: a weight file's header cannot be read.
    """
    found = resolve(
        config, teacher, student, device=device, shared=shared, free_device=free_device, free_host=free_host
    )
    needed = estimate(found, teacher, student, device=device, shared=shared, corpus_tokens=corpus_tokens)
    settled = []
    if config.train.accumulation == "auto":
        settled.append(f"train.accumulation: auto: {told(found)}")
    if config.train.parallel == "auto" and config.train.devices > 1:
        settled.append(f"train.parallel: auto: {found.train.parallel}")
    return msgspec.structs.replace(needed, settled=tuple(settled))


def kept_parts(config: RunConfig, before: Run) -> int:
    """In how many parts a later attempt divides a batch.

    With other devices than before the parts keep their windows, as nearly as they can be equal: memory depends on
    these.
    """
    windows = max(1, config.train.batch // max(1, before.world_size * before.accumulation))
    mine = share(config)
    return next(parts for parts in equal_parts(mine) if mine // parts <= windows)


def share(config: RunConfig) -> int:
    """Windows of a step's batch that one device takes."""
    return max(1, config.train.batch // config.train.devices)


def equal_parts(windows: int) -> list[int]:
    """The numbers of parts that divide so many windows evenly, the smallest first."""
    small = [parts for parts in range(1, math.isqrt(windows) + 1) if windows % parts == 0]
    return sorted({*small, *(windows // parts for parts in small)})


def told(config: RunConfig) -> str:
    """What a resolved configuration makes of a device's share of the batch, such as `4 parts of 4 windows`."""
    mine, parts = share(config), config.train.parts
    windows = -(-mine // parts)
    return f"{parts:,} part{'s' * (parts != 1)} of {windows:,} window{'s' * (windows != 1)}"


def relief(config: RunConfig, parts: int | None = None) -> str:
    """What to do about a run that has too little memory for its step.

    Args:
        config: as it was given.
        parts: that a step was divided in; None: what the configuration says, and of `auto` as many as there can be.
    """
    if config.mode == "evaluate":
        answers = config.evaluate.runs_code
        return "lower evaluate.batch or evaluate.max_new_tokens" if answers else "lower train.batch"
    train, most = config.train, share(config)
    automatic = train.accumulation == "auto"
    had = parts if parts is not None else most if automatic else train.parts
    more = next((number for number in equal_parts(most) if number > had), None)
    advice = []
    if more is not None:
        advice.append(f"set train.accumulation: {more}" if automatic else f"set train.accumulation: auto (it is {had})")
    if config.makes_steps and not train.activation_checkpointing:
        advice.append("set train.activation_checkpointing: true")
    advice.append("lower train.sequence" if more is None else "lower train.batch or train.sequence")
    return ", or ".join(advice)


def free_host_bytes(*, shared: bool) -> int | None:
    """Memory of this machine that a run which is just beginning can plan with; None where Linux does not tell.

    What this process has taken already counts as free: the estimate has a row for it.

    Args:
        shared: it is a GPU's memory too, so that one part in `UNIFIED_RESERVE` of all of it stays free.
    """
    available = proc_bytes(_MEMINFO, "MemAvailable")
    if available is None:
        return None
    mine = proc_bytes(_STATUS, "VmRSS") or 0
    reserve = (proc_bytes(_MEMINFO, "MemTotal") or 0) // UNIFIED_RESERVE if shared else 0
    return max(0, available + mine - reserve)


def _with(config: RunConfig, parts: int, parallel: Literal["auto", "ddp", "fsdp"]) -> RunConfig:
    train = msgspec.structs.replace(config.train, accumulation=parts, parallel=parallel)
    return msgspec.structs.replace(config, train=train)


def _planned(free: int | None) -> int | None:
    return None if free is None else free - free // MARGIN
