"""The distillation loss: a plain reference, and the fused form that trains.

For one labelled position with student logits s, teacher logits t, label y, temperature T and alpha a:

    L     = a CE(softmax(s), y) + (1 - a) T² KL(softmax(t/T) || softmax(s/T))
    dL/ds = a (softmax(s) - onehot(y)) + (1 - a) T (softmax(s/T) - softmax(t/T))

Since dL/ds has a closed form, `fused_kd_loss` makes the gradients of the student's hidden states and head during the
forward pass, a chunk of tokens at a time. No [tokens, vocabulary] tensor of the whole batch exists, nothing is
computed twice, and the cost is close to that of the four matrix products which any form needs.

Source: Hinton, Vinyals, Dean (2015), arXiv:1503.02531, section 2.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORE = -100
"""The label that leaves a position out of the loss."""

CHUNK_BYTES = 64 * 2**20


class KdLoss(NamedTuple):
    """A loss and its two parts, in nats per labelled token (see `normalizer`); 0-dim, float32 or wider."""

    total: Tensor
    """alpha ce + (1 - alpha) kd; the only one that is differentiable."""
    ce: Tensor
    """Cross-entropy of the student on the labels, detached."""
    kd: Tensor
    """T² KL(teacher || student), detached; zero when both agree, and when there is no teacher."""
    tokens: int
    """Labelled positions of this call."""


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
    if (normalizer is not None and normalizer < 1) or chunk_bytes < 1:
        raise ValueError(f"normalizer {normalizer}, chunk_bytes {chunk_bytes}: expected at least 1")
    vocabulary = student_head.shape[0]
    keep = labels != IGNORE
    index: Tensor | None = None
    if labels.device.type != "cpu" or not bool(keep.all()):
        index = keep.nonzero().squeeze(1)
        labels = labels[index]
        index = index.to(student_hidden.device, non_blocking=True)
    tokens = len(labels)
    if tokens and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise ValueError(f"labels {int(labels.min())} to {int(labels.max())}: expected ids of 0 to {vocabulary - 1}")
    grad = torch.is_grad_enabled()
    plan = _Plan(
        # Without a teacher the temperature changes nothing, and 1 saves a pass.
        temperature=temperature if teacher_hidden is not None else 1.0,
        alpha=alpha,
        scale=1 / (normalizer or max(tokens, 1)),
        rows=max(1, min(tokens, chunk_bytes // (4 * vocabulary))),
        index=None if tokens == len(keep) else index,
        labels=labels.to(student_hidden.device, torch.int64, non_blocking=True),
        needs=(grad and student_hidden.requires_grad, grad and student_head.requires_grad),
        compile=compile,
    )
    if teacher_head is not None:
        teacher_head = teacher_head[:vocabulary]
    total, ce, kd = _FusedKdLoss.apply(student_hidden, student_head, teacher_hidden, teacher_head, plan)
    return KdLoss(total, ce, kd, tokens)


@dataclass(frozen=True)
class _Plan:
    """What a call of the loss was asked for, apart from its tensors."""

    temperature: float
    alpha: float
    scale: float  # of the sums: one over the number of tokens
    rows: int  # tokens in a chunk
    index: Tensor | None  # positions of the labelled tokens; None: all of them
    labels: Tensor  # of those positions only
    needs: tuple[bool, bool]  # gradient of the hidden states, of the head
    compile: bool


class _FusedKdLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        teacher_hidden, teacher_head, plan = rest
        ce, kd, *gradients = _loss_and_gradients(hidden, head, teacher_hidden, teacher_head, plan)
        # Not save_for_backward: it would keep a second reference, and autograd would copy the head's gradient.
        ctx.gradients = gradients
        ctx.mark_non_differentiable(ce, kd)
        return plan.alpha * ce + (1 - plan.alpha) * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of fused_kd_loss ran already; call the loss again for a second one")
        hidden, head = ctx.gradients
        ctx.gradients = None
        # On a GPU looking at the factor would wait for it; on the CPU it saves a pass over the head's gradient.
        if grad_total.device.type != "cpu" or grad_total != 1:
            for gradient in (hidden, head):
                if gradient is not None:
                    gradient.mul_(grad_total)
        return hidden, head, None, None, None


class _Buffers:
    """Tensors of [chunk, vocabulary] by name: allocated when first asked for, and reused by every chunk."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._shape, self._device = (rows + 1, vocabulary), device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        if (name, dtype) not in self._held:
            # One row is never used: where a view is as large as its base, torch.compile takes that for a rule.
            self._held[name, dtype] = torch.empty(self._shape, dtype=dtype, device=self._device)
        return self._held[name, dtype][:rows]


def _loss_and_gradients(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gives ce, kd and the gradients of hidden states and head; a gradient that is not needed is None."""
    positions, head_dtype = len(hidden), head.dtype
    if plan.index is not None:
        hidden = hidden.index_select(0, plan.index)
        teacher_hidden = None if teacher_hidden is None else teacher_hidden.index_select(0, plan.index)
    head = head.to(hidden.dtype)
    if teacher_hidden is not None and teacher_head is not None:
        teacher_head = teacher_head.to(teacher_hidden.dtype)
    tokens, wide = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    # A gradient by the logits is kept within -1 and 1; the products that use it bring in its true size.
    size = plan.alpha + (1 - plan.alpha) * plan.temperature
    hard, scale = plan.alpha / size, plan.scale * size

    buffers = _Buffers(plan.rows, len(head), hidden.device)
    ce, kd = hidden.new_zeros(2, tokens, dtype=wide)
    grad_hidden = torch.empty_like(hidden) if plan.needs[0] else None
    grad_head = torch.empty_like(head, dtype=wide) if plan.needs[1] else None
    if grad_head is not None and (hidden.dtype != wide or not tokens):
        grad_head.zero_()  # otherwise the first chunk overwrites what is there, which saves a pass

    def logits(name: str, states: Tensor, weight: Tensor) -> Tensor:
        product = buffers.take(name, len(states), states.dtype)
        product.addmm_(states, weight.T, beta=0, alpha=1 / plan.temperature)
        return product if product.dtype == wide else buffers.take(name, len(states), wide).copy_(product)

    for begin in range(0, tokens, plan.rows):
        chunk = slice(begin, begin + plan.rows)
        states, labels = hidden[chunk], plan.labels[chunk, None]
        student, teacher = logits("student", states, head), None
        if teacher_hidden is not None and teacher_head is not None:
            teacher = logits("teacher", teacher_hidden[chunk], teacher_head)
        losses = _compiled(student, teacher, labels, plan.temperature, hard) if plan.compile else None
        if losses is None:
            ce[chunk], kd[chunk], gradient = _eager(student, teacher, labels, plan.temperature, hard, buffers)
        else:
            (ce[chunk], kd[chunk]), gradient = losses, student
        if not any(plan.needs):
            continue
        gradient.scatter_add_(1, labels, torch.full_like(labels, -hard, dtype=wide))
        if hidden.dtype != wide:
            gradient = buffers.take("student", len(states), hidden.dtype).copy_(gradient)
        if grad_hidden is not None:
            grad_hidden[chunk].addmm_(gradient, head, beta=0, alpha=scale)
        if grad_head is not None:
            if hidden.dtype == wide:
                grad_head.addmm_(gradient.T, states, beta=1 if begin else 0, alpha=scale)
            else:  # a product sums in float32 within its chunk; only its result is rounded
                grad_head.add_(torch.mm(gradient.T, states), alpha=scale)

    if grad_hidden is not None and plan.index is not None:
        grad_hidden = grad_hidden.new_zeros(positions, hidden.shape[1]).index_copy_(0, plan.index, grad_hidden)
    if grad_head is not None:
        grad_head = grad_head.to(head_dtype)
    return ce.sum() * plan.scale, kd.sum() * plan.scale, grad_hidden, grad_head


def _eager(
    student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, hard: float, buffers: _Buffers
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
    """`_eager` in the form that a compiler turns into few loops; the gradient overwrites `student`.

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
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_fusible, dynamic=True)
    return compiled


_compile_failures: list[str] = []


def _compiled(*chunk: Tensor | float | None) -> tuple[Tensor, Tensor] | None:
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
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: expected 0 to 1")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature}: expected more than 0")
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels of shape {list(labels.shape)}, {labels.dtype}: expected integers of shape [tokens]")
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head: expected both or neither")
    if teacher_hidden is None and alpha != 1:
        raise ValueError(f"alpha {alpha} without a teacher: expected 1")
    for role, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden is None or head is None:
            continue
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or len(hidden) != len(labels):
            raise ValueError(
                f"{role} hidden {list(hidden.shape)}, head {list(head.shape)}, labels {list(labels.shape)}: "
                "expected [tokens, width], [vocabulary, width] and [tokens]"
            )
        if not (hidden.is_floating_point() and head.is_floating_point()):
            raise ValueError(f"{role} hidden {hidden.dtype}, head {head.dtype}: expected floating-point numbers")
    if teacher_head is not None and len(teacher_head) < len(student_head):
        raise ValueError(f"teacher vocabulary {len(teacher_head)}: expected at least the student's {len(student_head)}")
