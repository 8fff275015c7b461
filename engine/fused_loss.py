"""A student's linear head and a distillation loss in one, a chunk of tokens at a time, the gradients made on the way.

Since dL/ds has a closed form (see `engine.kd_loss`), the gradients of the student's hidden states and head are made
during the forward pass. No [tokens, vocabulary] tensor of the whole batch exists, nothing is computed twice, and the
cost is close to that of the matrix products which any form needs. Where the teacher's logits of a chunk come from is
the caller's: an `Aim`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.loss_math import Buffers, compiled, eager

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


class Aim(Protocol):
    """What the student is held against."""

    def logits(self, chunk: slice, student: Tensor, buffers: Buffers) -> Tensor:
        """The teacher's logits over the temperature, up to a constant of each row.

        Args:
            chunk: which of the labelled positions.
            student: the student's logits over the temperature, shape [chunk, vocabulary]; not to be changed.
            buffers: room for the answer under the name `teacher`; `goal` and `likely` are free as well.

        Returns:
            Shape [chunk, vocabulary], the student's dtype, in a buffer that will be overwritten.
        """


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


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    aim: Callable[[Tensor | None], Aim] | None,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    normalizer: int | None,
    chunk_bytes: int,
    compile: bool,
) -> KdLoss:
    """The loss that `fused_kd_loss` and `topk_loss.fused_topk_loss` document; shapes are checked by them.

    Args:
        hidden: the student's last hidden states, shape [tokens, width].
        head: weight of the student's head, shape [vocabulary, width].
        aim: given the labelled positions (None: all of them), makes what the student is held against; None: nothing.
        labels: next-token ids, shape [tokens].
        temperature: softens both distributions.
        alpha: weight of the cross-entropy.
        normalizer: divide the sums by this many tokens rather than by the labelled ones of this call.
        chunk_bytes: size of one chunk of logits.
        compile: run the arithmetic of a chunk through torch.compile.

    Raises:
        ValueError: normalizer or chunk_bytes is below 1, or a label in CPU memory is out of range.
    """
    if (normalizer is not None and normalizer < 1) or chunk_bytes < 1:
        raise ValueError(f"normalizer {normalizer}, chunk_bytes {chunk_bytes}: expected at least 1")
    vocabulary = head.shape[0]
    keep = labels != IGNORE
    index: Tensor | None = None
    if labels.device.type != "cpu" or not bool(keep.all()):
        index = keep.nonzero().squeeze(1)
        labels = labels[index]
        index = index.to(hidden.device, non_blocking=True)
    tokens = len(labels)
    if tokens and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise ValueError(f"labels {int(labels.min())} to {int(labels.max())}: expected ids of 0 to {vocabulary - 1}")
    grad = torch.is_grad_enabled()
    plan = _Plan(
        # Without a teacher the temperature changes nothing, and 1 saves a pass.
        temperature=temperature if aim is not None else 1.0,
        alpha=alpha,
        scale=1 / (normalizer or max(tokens, 1)),
        rows=max(1, min(tokens, chunk_bytes // (4 * vocabulary))),
        index=None if tokens == len(keep) else index,
        labels=labels.to(hidden.device, torch.int64, non_blocking=True),
        needs=(grad and hidden.requires_grad, grad and head.requires_grad),
        compile=compile,
    )
    total, ce, kd = _FusedLoss.apply(hidden, head, aim, plan)  # type: ignore[no-untyped-call]
    return KdLoss(total, ce, kd, tokens)


def check_settings(labels: Tensor, temperature: float, alpha: float) -> None:
    """Raises ValueError for an alpha or temperature out of range, or labels that are none."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: expected 0 to 1")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature}: expected more than 0")
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels of shape {list(labels.shape)}, {labels.dtype}: expected integers of shape [tokens]")


def check_states(role: str, hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    """Raises ValueError where hidden states do not fit their head or the labels."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or len(hidden) != len(labels):
        raise ValueError(
            f"{role} hidden {list(hidden.shape)}, head {list(head.shape)}, labels {list(labels.shape)}: "
            "expected [tokens, width], [vocabulary, width] and [tokens]"
        )
    if not (hidden.is_floating_point() and head.is_floating_point()):
        raise ValueError(f"{role} hidden {hidden.dtype}, head {head.dtype}: expected floating-point numbers")


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        aim, plan = rest
        ce, kd, *gradients = _loss_and_gradients(hidden, head, aim, plan)
        # Not save_for_backward: it would keep a second reference, and autograd would copy the head's gradient.
        ctx.gradients = gradients
        ctx.mark_non_differentiable(ce, kd)
        return plan.alpha * ce + (1 - plan.alpha) * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of the fused loss ran already; call the loss again for a second one")
        hidden, head = ctx.gradients
        ctx.gradients = None
        # On a GPU looking at the factor would wait for it; on the CPU it saves a pass over the head's gradient.
        if grad_total.device.type != "cpu" or grad_total != 1:
            for gradient in (hidden, head):
                if gradient is not None:
                    gradient.mul_(grad_total)
        return hidden, head, None, None


def product(
    buffers: Buffers, name: str, states: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Logits over the temperature, shape [chunk, vocabulary], in the buffer of that name and dtype."""
    made = buffers.take(name, len(states), states.dtype)
    made.addmm_(states, weight.T, beta=0, alpha=1 / temperature)
    return made if made.dtype == dtype else buffers.take(name, len(states), dtype).copy_(made)


def _loss_and_gradients(
    hidden: Tensor, head: Tensor, aim: Callable[[Tensor | None], Aim] | None, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gives ce, kd and the gradients of hidden states and head; a gradient that is not needed is None."""
    positions, head_dtype = len(hidden), head.dtype
    if plan.index is not None:
        hidden = hidden.index_select(0, plan.index)
    goal = None if aim is None else aim(plan.index)
    head = head.to(hidden.dtype)
    tokens, wide = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    # A gradient by the logits is kept within -1 and 1; the products that use it bring in its true size.
    size = plan.alpha + (1 - plan.alpha) * plan.temperature
    hard, scale = plan.alpha / size, plan.scale * size

    buffers = Buffers(plan.rows, len(head), hidden.device)
    ce, kd = hidden.new_zeros(2, tokens, dtype=wide)
    grad_hidden = torch.empty_like(hidden) if plan.needs[0] else None
    grad_head = torch.empty_like(head, dtype=wide) if plan.needs[1] else None
    if grad_head is not None and (hidden.dtype != wide or not tokens):
        grad_head.zero_()  # otherwise the first chunk overwrites what is there, which saves a pass

    for begin in range(0, tokens, plan.rows):
        chunk = slice(begin, begin + plan.rows)
        states, labels = hidden[chunk], plan.labels[chunk, None]
        student = product(buffers, "student", states, head, plan.temperature, wide)
        teacher = None if goal is None else goal.logits(chunk, student, buffers)
        losses = compiled(student, teacher, labels, plan.temperature, hard) if plan.compile else None
        if losses is None:
            ce[chunk], kd[chunk], gradient = eager(student, teacher, labels, plan.temperature, hard, buffers)
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
