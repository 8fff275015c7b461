"""The arithmetic of one chunk of the distillation loss, from logits of student and teacher: eager, and compiled."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Buffers:
    """Tensors of [chunk, vocabulary] by name: allocated when first asked for, and reused by every chunk."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._shape, self._device = (rows + 1, vocabulary), device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """The first rows of the tensor of that name and dtype."""
        if (name, dtype) not in self._held:
            # One row is never used: where a view is as large as its base, torch.compile takes that for a rule.
            self._held[name, dtype] = torch.empty(self._shape, dtype=dtype, device=self._device)
        return self._held[name, dtype][:rows]


def eager(
    student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, hard: float, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """The arithmetic of one chunk, with as few passes over [chunk, vocabulary] as eager operations allow.

    Args:
        student: logits over the temperature, shape [chunk, vocabulary]; overwritten.
        teacher: the same of the teacher, or None; overwritten.
        labels: shape [chunk, 1].
        temperature: of the distillation.
        hard: share of the cross-entropy in the gradient, 0 to 1.
        buffers: room for two more tensors of that shape.

    Returns:
        ce and kd of each row, and hard softmax(s) + (1 - hard) (softmax(s/T) - softmax(t/T)): the gradient but for
        its size and the label's own term.
    """
    rows, wide = len(student), student.dtype
    top, logits, likely = student.amax(1), student, buffers.take("likely", rows, wide)
    if temperature != 1:
        logits = torch.mul(student, temperature, out=buffers.take("goal", rows, wide))
    torch.softmax(logits, 1, out=likely)
    # The largest probability is exp(top - logsumexp): its logarithm gives logsumexp without another exp.
    ce = temperature * (top - student.gather(1, labels).squeeze(1)) - likely.amax(1).log()
    if teacher is None:
        return ce, torch.zeros_like(ce), likely
    goal = torch.softmax(teacher, 1, out=buffers.take("goal", rows, wide))
    log_norm_teacher = teacher.amax(1) - goal.amax(1).log()
    gap = teacher.sub_(student).mul_(goal).sum(1)
    soft = torch.softmax(student, 1, out=teacher)
    log_norm_student = top - soft.amax(1).log()
    kd = temperature**2 * (gap + (log_norm_student - log_norm_teacher))
    if hard == 1:
        return ce, kd, likely
    pull = soft.sub_(goal)
    return ce, kd, likely.lerp_(pull, 1 - hard) if hard > 0 else pull


def _fusible(
    student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, hard: float
) -> tuple[Tensor, Tensor]:
    """`eager` in the form that a compiler turns into few loops; the gradient overwrites `student`.

    Powers of two, since inductor writes every exp that is used twice to a tensor of its own, and no exp2.
    """
    bits = math.log2(math.e)
    centred = student - student.amax(1, keepdim=True)
    likely = (centred * (temperature * bits)).exp2()
    likely_sum = likely.sum(1, keepdim=True)
    ce = likely_sum.log() - temperature * centred.gather(1, labels)
    if teacher is None:
        student.copy_(likely / likely_sum)
        return ce.squeeze(1), torch.zeros_like(ce).squeeze(1)
    teacher_centred = teacher - teacher.amax(1, keepdim=True)
    soft, goal = (centred * bits).exp2(), (teacher_centred * bits).exp2()
    soft_sum, goal_sum = soft.sum(1, keepdim=True), goal.sum(1, keepdim=True)
    gap = (goal * (teacher_centred - centred)).sum(1, keepdim=True) / goal_sum
    kd = temperature**2 * (gap + (soft_sum.log() - goal_sum.log()))
    student.copy_(likely * (hard / likely_sum) + soft * ((1 - hard) / soft_sum) - goal * ((1 - hard) / goal_sum))
    return ce.squeeze(1), kd.squeeze(1)


@functools.cache
def _compiler() -> Callable[..., tuple[Tensor, Tensor]]:
    # Rows differ with the labelled tokens of a batch: dynamic shapes keep that from compiling again.
    made: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_fusible, dynamic=True)
    return made


_compile_failures: list[str] = []


def compiled(*chunk: Tensor | float | None) -> tuple[Tensor, Tensor] | None:
    """`_fusible` through torch.compile; None, with one warning, where that does not work."""
    if _compile_failures:
        return None
    try:
        return _compiler()(*chunk)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError, OSError) as error:  # raised while compiling, before a buffer is overwritten
        _compile_failures.append((str(error).strip() or type(error).__name__).splitlines()[0])
        text = f"the loss runs without torch.compile, which failed: {_compile_failures[0]}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None
