"""The distillation loss where only the teacher's K largest logits of a position are known, and the mass of the rest.

The rest of the vocabulary is one more bucket, so that both distributions have K + 1 entries and the loss is a true
Kullback-Leibler divergence between them. With p the teacher's and q the student's at temperature T:

    KL         = sum over stored j of p_j ln(p_j / q_j) + p_rest ln(p_rest / q_rest)
    dKL/ds_j   = (q_j - p_j) / T                          stored j
                 q_j (1 - p_rest / q_rest) / T            any other j

The second line is q_j - p_rest w_j with w_j = q_j / q_rest, the student's own distribution over the rest. So the coarse
loss is the full one against a teacher that says p_j where it is known and, over the rest, what the student says
itself, scaled to the mass p_rest. Its logits are made here for a chunk of tokens; all that follows is shared with
`engine.kd_loss`. q_rest is summed over the rest, as logarithms: what is left of 1 would be nothing but rounding where
the stored logits hold nearly everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from engine.fused_loss import CHUNK_BYTES, IGNORE, Aim, KdLoss, check_settings, check_states, fused_loss
from engine.loss_math import Buffers


class TopK(NamedTuple):
    """The largest logits of positions, with what the others add up to; all three up to a constant of each row."""

    ids: Tensor
    """Which they are, integers of shape [tokens, K]; each once in a row."""
    logits: Tensor
    """Their values, not divided by the temperature, shape [tokens, K]."""
    tail: Tensor
    """Log-sum-exp of all other logits over the temperature, shape [tokens]."""

    def log_shares(self, temperature: float, dtype: torch.dtype) -> Tensor:
        """Logarithm of the share of the stored ones and, last, of the rest; shape [tokens, K + 1]."""
        scores = self.logits.to(dtype) / temperature
        return torch.cat([scores, self.tail.to(dtype).unsqueeze(1)], dim=1).log_softmax(1)


def top_k_of(logits: Tensor, k: int, temperature: float) -> TopK:
    """The K largest logits of each row and the log-sum-exp of the rest, counted from the largest one.

    Args:
        logits: shape [tokens, vocabulary], float32 or wider.
        k: how many, 1 to vocabulary - 1.
        temperature: of the log-sum-exp.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k < logits.shape[1]:
        raise ValueError(f"k {k}: expected 1 to {logits.shape[1] - 1}, one less than the vocabulary")
    values, ids = logits.topk(k, dim=1)
    rest = logits.scatter(1, ids, -torch.inf)
    top = values[:, :1]
    return TopK(ids, values - top, rest.sub_(top).div_(temperature).logsumexp(1))


def topk_loss_reference(
    student_logits: Tensor,
    teacher: TopK,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    normalizer: int | None = None,
) -> KdLoss:
    """The same loss from whole logits by autograd: plain, slow, and what `fused_topk_loss` is held against.

    Args:
        student_logits: shape [tokens, vocabulary]; float32 arithmetic, float64 where they are float64.
        teacher: its largest logits, at this temperature.
        labels: next-token ids, shape [tokens]; `IGNORE` leaves a position out.
        temperature: softens both distributions; > 0.
        alpha: weight of the cross-entropy, 0 to 1.
        normalizer: divide the sums by this many tokens rather than by the labelled ones of this call.

    Returns:
        The loss; kd is T² KL over K + 1 buckets. All zero where no position is labelled.
    """
    keep = labels != IGNORE
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits[keep].to(wide), TopK(*(part[keep] for part in teacher))
    share = 1 / (normalizer or max(len(student), 1))
    ce = functional.cross_entropy(student, labels[keep], reduction="sum") * share
    ids = teacher.ids.to(torch.int64)
    log_q = (student / temperature).log_softmax(1)
    rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    coarse = torch.cat([log_q.gather(1, ids), rest], dim=1)
    goal = teacher.log_shares(temperature, wide)
    kd = functional.kl_div(coarse, goal, reduction="sum", log_target=True) * temperature**2 * share
    return KdLoss(alpha * ce + (1 - alpha) * kd, ce.detach(), kd.detach(), len(student))


def fused_topk_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: TopK,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    normalizer: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    compile: bool = False,
) -> KdLoss:
    """The student's head and the coarse loss in one, with the gradients made in the forward pass.

    Everything that `engine.kd_loss.fused_kd_loss` says of dtypes, labels, normalizer, chunks and compilation holds
    here; both are one loop. A chunk needs one more float32 buffer than there when it is compiled, and no more when it
    is not. Ids on a GPU are not range-checked.

    Args:
        student_hidden: last hidden states, shape [tokens, width].
        student_head: weight of the student's head, shape [vocabulary, width].
        teacher: its largest logits, at this temperature; fewer than the vocabulary.
        labels: next-token ids, shape [tokens]; `IGNORE` leaves a position out.
        temperature: softens both distributions; > 0.
        alpha: weight of the cross-entropy, 0 to 1.
        normalizer: divide the sums by this many tokens rather than by the labelled ones of this call.
        chunk_bytes: size of one chunk of logits, [chunk, vocabulary] in float32.
        compile: run the arithmetic of a chunk through torch.compile.

    Returns:
        The loss; total is differentiable with respect to `student_hidden` and `student_head`.

    Raises:
        ValueError: shapes or dtypes do not fit, or an argument, a label or an id is out of range.
    """
    check_settings(labels, temperature, alpha)
    check_states("student", student_hidden, student_head, labels)
    _check(teacher, len(labels), len(student_head))

    def aim(index: Tensor | None) -> Aim:
        return _Stored(
            teacher if index is None else TopK(*(part.index_select(0, index) for part in teacher)), temperature
        )

    return fused_loss(
        student_hidden,
        student_head,
        aim,
        labels,
        temperature=temperature,
        alpha=alpha,
        normalizer=normalizer,
        chunk_bytes=chunk_bytes,
        compile=compile,
    )


@dataclass(frozen=True)
class _Stored:
    """A teacher of whom the largest logits are known: where they are not, it says what the student says."""

    teacher: TopK
    temperature: float

    def logits(self, chunk: slice, student: Tensor, buffers: Buffers) -> Tensor:
        part = TopK(*(each[chunk] for each in self.teacher))
        ids, shares = part.ids.to(torch.int64), part.log_shares(self.temperature, student.dtype)
        made = buffers.take("teacher", len(student), student.dtype)
        made.copy_(student).scatter_(1, ids, -torch.inf)
        # The largest share is exp(top - logsumexp): its logarithm gives logsumexp without room of its own.
        goal = torch.softmax(made, 1, out=buffers.take("goal", len(student), student.dtype))
        rest = made.amax(1, keepdim=True) - goal.amax(1, keepdim=True).log_()
        return made.add_(shares[:, -1:] - rest).scatter_(1, ids, shares[:, :-1])


def _check(teacher: TopK, tokens: int, vocabulary: int) -> None:
    """Raises ValueError where the stored logits do not fit."""
    ids, logits, tail = teacher
    if ids.dim() != 2 or ids.shape != logits.shape or tail.shape != ids.shape[:1] or len(ids) != tokens:
        raise ValueError(
            f"ids {list(ids.shape)}, logits {list(logits.shape)}, tail {list(tail.shape)}, {tokens} labels: "
            "expected [tokens, K], [tokens, K] and [tokens]"
        )
    if ids.is_floating_point() or not (logits.is_floating_point() and tail.is_floating_point()):
        raise ValueError(f"ids {ids.dtype}, logits {logits.dtype}, tail {tail.dtype}: expected integers and two floats")
    if not 1 <= ids.shape[1] < vocabulary:
        raise ValueError(f"{ids.shape[1]} logits a token: expected 1 to {vocabulary - 1}, below the vocabulary")
    if tokens and ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"ids {int(ids.min())} to {int(ids.max())}: expected 0 to {vocabulary - 1}")
