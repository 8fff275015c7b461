"""What a run with several processes settles among them: where each computes, how the models are spread, who is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from engine.account import against
from engine.config import RunConfig
from engine.device import Placement, place
from engine.errors import ExitCode
from engine.loading import Loaded
from engine.models import CausalLM
from engine.parallel import Way, gather_into, shard
from engine.rank_process import Record, Seat
from engine.ranks import Ranks, device_of
from engine.recorder import Recorder
from engine.stop import StopRequest
from engine.training import Ended

SHARES: Final[Mapping[Way, str]] = {
    "single": "which has everything",
    "ddp": "each with whole models (ddp)",
    "fsdp": "each with a part of the models (fsdp)",
}
"""What a process has of the models, in words."""
_FATAL, _STOP = 1, 2


def placed(config: RunConfig, seat: Seat | None) -> Placement:
    """Device and precision of this process.

    Raises:
        ConfigError: the device asked for is not there, or there are fewer of it than `train.devices`.
    """
    placement = place(config.train)
    return replace(placement, device=device_of(seat, placement.device, config.train.devices))


def agreed(settled: RunConfig, ranks: Ranks, *, kept: bool) -> tuple[int, Way]:
    """All: the parts of a batch and the way that all take, from what each found to fit.

    Args:
        settled: what this process found; see `engine.sizing.settled`.
        ranks: of this process.
        kept: the parts are those of an earlier attempt, which rank 0 alone knows of.
    """
    most = ranks.agree(settled.train.parts)
    parts = ranks.share(settled.train.parts if kept else most)
    if ranks.world == 1:
        return parts, "single"
    return parts, "fsdp" if ranks.agree(settled.train.parallel == "fsdp") else "ddp"


def loads_on(placement: Placement, way: Way) -> Placement:
    """Where models are loaded and looked at: what is to be divided because it does not fit, in the host's memory."""
    return replace(placement, device=torch.device("cpu")) if way == "fsdp" else placement


def divided(loaded: Loaded, ranks: Ranks, device: torch.device) -> Loaded:
    """All: the same with models of which each process holds a part.

    Raises:
        ConfigError: a model cannot be divided; see `engine.parallel.shard`.
    """
    teacher = shard(loaded.teacher, ranks, device) if isinstance(loaded.teacher, CausalLM) else loaded.teacher
    return replace(loaded, teacher=teacher, student=shard(loaded.student, ranks, device))


def whole_student(student: CausalLM, config: RunConfig, ranks: Ranks) -> CausalLM:
    """All: a divided student made whole in the host's memory of rank 0; the others get their own back."""
    from engine.models import load_student

    fresh = load_student(config.student, torch.device("cpu"), config.train.seed) if ranks.main else None
    gather_into(student.model, None if fresh is None else fresh.model)
    return student if fresh is None else fresh


def poll(ranks: Ranks, stop: StopRequest, recorder: Recorder) -> None:
    """All: ends the run where a signal asked for it or a fatal verdict fell, in every process or in none.

    Raises:
        Ended: with status STOPPED or FAILED.
    """
    # The other processes judge a part of what rank 0 does: it alone decides.
    fatal = recorder.fatal if ranks.main else None
    flag = ranks.agree(_STOP if stop.signal is not None else _FATAL if fatal is not None else 0)
    if flag == _STOP:
        name = stop.signal or "a signal to another process"
        raise Ended("STOPPED", f"{name} in phase {recorder.phase}", ExitCode.INTERRUPTED)
    if flag == _FATAL:
        raise Ended("FAILED", "rank 0 judged so" if fatal is None else against([fatal]), ExitCode.FAILED)


def without(lost: Record, saved: str) -> Ended:
    """How a run ends of which a process is gone.

    Args:
        lost: who.
        saved: what became of the work, in words.
    """
    if lost.status == "STOPPED":
        return Ended("STOPPED", lost.reason, ExitCode.INTERRUPTED)
    reason = f"{lost}; all others ended with it; {saved}"
    if lost.status == "FAILED":
        return Ended("FAILED", reason, ExitCode(lost.exit_code))
    return Ended("CRASHED", reason, ExitCode.UNDECIDED)
