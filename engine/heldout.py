"""What a student makes of held-out text, alone and beside its teacher: the trainer's evaluation, at temperature 1."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.config import RunConfig
from engine.data import Corpus
from engine.device import Placement
from engine.distill import Pair
from engine.models import CausalLM
from engine.teacher_store import StoredTeacher


@dataclass(frozen=True)
class Heldout:
    """Means over the labels of the held-out windows."""

    loss: float
    """Cross-entropy in nats a token."""
    perplexity: float
    """exp(loss); infinite where that is too large for a number."""
    agreement: float | None
    """Share of positions where both have the same likeliest token, 0 to 1; None without a teacher."""
    kl: float | None
    """KL(teacher || student) at temperature 1, nats a token, over the student's vocabulary; None without a teacher."""
    tokens: int
    """Labels that the means are over."""
    seconds: float


def evaluate_heldout(
    config: RunConfig,
    student: CausalLM,
    teacher: CausalLM | StoredTeacher | None,
    corpus: Corpus,
    placement: Placement,
    poll: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    parts: int | None = None,
) -> Heldout:
    """Evaluates on `data.heldout_windows` windows, the ones that a training with this data evaluates on.

    Args:
        config: of the run; `distill` says no more than the size of a chunk here.
        student: on the device.
        teacher: on the device, or a stored one; None for none.
        corpus: as `engine.loading.load_data` reads it.
        placement: device and precision.
        poll: called before each batch; may raise to stop.
        progress: told windows done and windows in all, before each batch and at the end.
        parts: of `train.batch`, one of which is taken at once; None: `train.accumulation`.
    """
    started = time.monotonic()
    windows = torch.from_numpy(corpus.heldout_batch(config.data.heldout_windows)).to(placement.device)
    batch = max(1, config.train.batch // (parts or config.train.parts))
    pair = Pair(
        student=student,
        teacher=teacher,
        temperature=1.0,
        alpha=1.0,  # the weight of a sum that is not used here
        autocast=placement.autocast,
        chunk_bytes=config.distill.chunk_mib << 20,
        compile=False,
    )
    total, done = len(windows), 0

    def before_batch() -> None:
        nonlocal done
        poll()
        progress(done, total)
        done += batch

    found = pair.evaluate(windows, batch, before_batch)
    progress(total, total)
    try:
        perplexity = math.exp(found.ce)
    except OverflowError:
        perplexity = math.inf
    return Heldout(
        loss=found.ce,
        perplexity=perplexity,
        agreement=found.agreement,
        kl=None if teacher is None else found.kd,
        tokens=found.tokens,
        seconds=time.monotonic() - started,
    )
