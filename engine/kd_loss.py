"""The distillation loss: a plain reference, and the fused form that trains.

For one labelled position with student logits s, teacher logits t, label y, temperature T and alpha a:

    L     = a CE(softmax(s), y) + (1 - a) T² KL(softmax(t/T) || softmax(s/T))
    dL/ds = a (softmax(s) - onehot(y)) + (1 - a) T (softmax(s/T) - softmax(t/T))

`fused_kd_loss` makes the gradients of the student's hidden states and head during the forward pass, a chunk of tokens
at a time: see `engine.fused_loss` for how, `engine.loss_math` for the arithmetic and `engine.topk_loss` for a teacher
of whom only the largest logits are known.

Source: Hinton, Vinyals, Dean (2015), arXiv:1503.02531, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.fused_loss import CHUNK_BYTES, IGNORE, Aim, KdLoss, check_settings, check_states, fused_loss, product
from engine.loss_math import Buffers

__all__ = ["CHUNK_BYTES", "IGNORE", "KdLoss", "fused_kd_loss", "kd_loss_reference"]


def kd_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    normalizer: int | None = None,
) -> KdLoss:
    """The same loss from whole logits by autograd: plain, slow, and what `fused_kd_loss` is held against.

    Args:
        student_logits: shape [tokens, vocabulary]; float32 arithmetic, float64 where they are float64.
        teacher_logits: shape [tokens, at least vocabulary]; cut to the student's vocabulary and renormalised. No
            gradient flows into it. None where alpha is 1.
        labels: next-token ids, shape [tokens]; `IGNORE` leaves a position out.
        temperature: softens both distributions; > 0.
        alpha: weight of the cross-entropy, 0 to 1.
        normalizer: divide the sums by this many tokens rather than by the labelled ones of this call.

    Returns:
        The loss; all zero where no position is labelled.
    """
    keep = labels != IGNORE
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = student_logits[keep].to(wide)
    tokens = len(student)
    share = 1 / (normalizer or max(tokens, 1))
    ce = functional.cross_entropy(student, labels[keep], reduction="sum") * share
    if teacher_logits is None:
        return KdLoss(alpha * ce, ce.detach(), torch.zeros_like(ce), tokens)
    teacher = teacher_logits.detach()[keep, : student.shape[1]].to(wide)
    log_student, log_teacher = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    kd = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2 * share
    return KdLoss(alpha * ce + (1 - alpha) * kd, ce.detach(), kd.detach(), tokens)


def fused_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    normalizer: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    compile: bool = False,
) -> KdLoss:
    """Linear heads and distillation loss in one, with the gradients made in the forward pass.

    The matrix products run in the dtype of the hidden states (a head of another dtype is cast to it); the softmax
    arithmetic, the loss and the head's gradient are kept in float32 (float64 for float64 hidden states). A backward
    pass hands the gradients over, so that it can run once for a call.

    With `labels` in CPU memory nothing waits for the device. With labels on a GPU there is one wait, for the number
    of labelled positions, and label ids are not range-checked.

    Args:
        student_hidden: last hidden states, shape [tokens, student width].
        student_head: weight of the student's head, shape [vocabulary, student width]; may be tied to the embedding.
        teacher_hidden: last hidden states, shape [tokens, teacher width]; None only where alpha is 1, and then kd is
            reported as zero. No gradient flows into it.
        teacher_head: weight of the teacher's head, shape [at least vocabulary, teacher width]. Rows beyond the
            student's vocabulary are left out, which renormalises the teacher's distribution over the rest.
        labels: next-token ids, shape [tokens]; `IGNORE` leaves a position out before any product is made.
        temperature: softens both distributions; > 0.
        alpha: weight of the cross-entropy, 0 to 1.
        normalizer: divide the sums by this many tokens rather than by the labelled ones of this call, so that the
            micro-batches of one batch add up to its mean.
        chunk_bytes: size of one chunk of logits, [chunk, vocabulary] in float32; it holds one token at least. The
            eager arithmetic has four such buffers, the compiled one two. Larger chunks make faster products.
        compile: run the arithmetic of a chunk through torch.compile. Where that fails, no C++ compiler for instance,
            the eager arithmetic is used and one warning says so.

    Returns:
        The loss; total is differentiable with respect to `student_hidden` and `student_head`.

    Raises:
        ValueError: shapes or dtypes do not fit, an argument or a label is out of range, or the teacher is missing.
    """
    _validate(student_hidden, student_head, teacher_hidden, teacher_head, labels, temperature, alpha)

    def aim(index: Tensor | None) -> Aim:
        assert teacher_hidden is not None
        assert teacher_head is not None
        states = teacher_hidden if index is None else teacher_hidden.index_select(0, index)
        return _Model(states, teacher_head[: len(student_head)].to(states.dtype), temperature)

    return fused_loss(
        student_hidden,
        student_head,
        None if teacher_hidden is None else aim,
        labels,
        temperature=temperature,
        alpha=alpha,
        normalizer=normalizer,
        chunk_bytes=chunk_bytes,
        compile=compile,
    )


@dataclass(frozen=True)
class _Model:
    """A teacher's last hidden states and its head: the products of a chunk are made when it is its turn."""

    hidden: Tensor
    head: Tensor
    temperature: float

    def logits(self, chunk: slice, student: Tensor, buffers: Buffers) -> Tensor:
        return product(buffers, "teacher", self.hidden[chunk], self.head, self.temperature, student.dtype)


def _validate(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    temperature: float,
    alpha: float,
) -> None:
    """Raises ValueError for anything that does not fit together."""
    check_settings(labels, temperature, alpha)
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head: expected both or neither")
    if teacher_hidden is None and alpha != 1:
        raise ValueError(f"alpha {alpha} without a teacher: expected 1")
    check_states("student", student_hidden, student_head, labels)
    if teacher_hidden is None or teacher_head is None:
        return
    check_states("teacher", teacher_hidden, teacher_head, labels)
    if len(teacher_head) < len(student_head):
        raise ValueError(f"teacher vocabulary {len(teacher_head)}: expected at least the student's {len(student_head)}")
