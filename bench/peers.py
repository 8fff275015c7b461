"""The losses that others train with, set to be the same one: what `kd_loss.py` and `kd_step.py` measure ours against.

The loss is `a CE(s, y) + (1 - a) T² KL(softmax(t/T) || softmax(s/T))`, a mean over tokens. How each peer is set to it:

- plain: cross_entropy and kl_div on whole logits, as any tutorial has it.
- Liger: LigerFusedLinearJSDLoss with beta 0 (that is the KL above), weight_hard_loss a, weight_soft_loss (1 - a) T²:
  the same loss. Its chunk is ours, since its own of 1,024 tokens is no chunk at all here.
- torchtune: ForwardKLWithChunkedOutputLoss and CEWithChunkedOutputLoss, 8 chunks each, as its recipe has it. They know
  no temperature, so the logits of the KL are divided by T and its value multiplied by T². It leaves the teacher's
  entropy out, which changes no gradient; it is added to the value outside of what is timed.
- TRL, GKD: GKDTrainer.generalized_jsd_loss with beta 0, times T². No hard labels: the cross-entropy of the same
  whole logits is added.
- TRL, distillation: what its DistillationTrainer computes, in tiles of 4,096 tokens and 32,768 columns. It has no hard
  labels, and no logits to take them from but by another product with the head: it is compared at a = 0 alone. Times T².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Asked:
    """What all of them compute.

    Args:
        temperature: T.
        alpha: a, the weight of the cross-entropy.
        chunk: tokens in a chunk of those that can be told one.
        compile: whether the loss goes through torch.compile, in the way that its own package offers.
    """

    temperature: float
    alpha: float
    chunk: int
    compile: bool


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Student hidden [tokens, width] and head [vocabulary, width], the teacher's two, labels [tokens]: the mean loss."""


def plain(asked: Asked) -> Loss:
    """Autograd on whole logits."""

    def of_logits(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher = student.float(), teacher.float()
        soft = functional.kl_div(
            functional.log_softmax(student / asked.temperature, -1),
            functional.log_softmax(teacher / asked.temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        loss = (1 - asked.alpha) * asked.temperature**2 * soft
        return loss + asked.alpha * functional.cross_entropy(student, labels) if asked.alpha else loss

    return _on_logits(torch.compile(of_logits) if asked.compile else of_logits)


def liger(asked: Asked) -> Loss:
    """Liger's fused linear JSD."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=asked.alpha,
        weight_soft_loss=(1 - asked.alpha) * asked.temperature**2,
        beta=0.0,
        temperature=asked.temperature,
        compiled=asked.compile,
        chunk_size=asked.chunk,
    )
    made: Loss = loss
    return made


def torchtune(asked: Asked) -> Loss:
    """torchtune's chunked forward KL and cross-entropy; without the teacher's entropy, see `entropy`."""
    from torchtune import training
    from torchtune.modules import loss as losses

    chunks = 8
    soft: Any = losses.ForwardKLWithChunkedOutputLoss(num_output_chunks=chunks)
    hard: Any = losses.CEWithChunkedOutputLoss(num_output_chunks=chunks)
    if asked.compile:
        soft, hard = training.compile_loss(soft, verbose=False), training.compile_loss(hard, verbose=False)

    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
        logits = [part @ head.T for part in student[None].chunk(chunks, dim=1)]
        with torch.no_grad():
            goal = [part @ teacher_head.T / asked.temperature for part in teacher[None].chunk(chunks, dim=1)]
        softened = [part / asked.temperature for part in logits]
        total: Tensor = (1 - asked.alpha) * asked.temperature**2 * soft(softened, goal, labels[None])
        return total + asked.alpha * hard(logits, labels[None]) if asked.alpha else total

    return loss


def trl_gkd(asked: Asked) -> Loss:
    """The loss of TRL's GKDTrainer, with the cross-entropy of the same logits."""
    from trl.experimental.gkd import GKDTrainer

    def of_logits(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft = GKDTrainer.generalized_jsd_loss(
            student[None],
            teacher[None],
            labels=labels[None],
            beta=0,
            temperature=asked.temperature,
            num_items_in_batch=len(labels),
        )
        loss: Tensor = (1 - asked.alpha) * asked.temperature**2 * soft
        return loss + asked.alpha * functional.cross_entropy(student.float(), labels) if asked.alpha else loss

    return _on_logits(torch.compile(of_logits) if asked.compile else of_logits)


def trl_tiles(asked: Asked) -> Loss:
    """The loss of TRL's DistillationTrainer; alpha must be 0."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    if asked.alpha:
        raise ValueError("its loss has no hard labels: alpha must be 0")
    if asked.compile:
        raise ValueError("it has no compiled form (Triton on a GPU, eager operations elsewhere)")

    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
        mask = torch.ones_like(labels)
        value: Tensor = _chunked_divergence_loss(
            student[None], teacher[None], head, teacher_head, mask[None], 0.0, temperature=asked.temperature
        )[0]
        return asked.temperature**2 * value

    return loss


def _on_logits(of_logits: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            goal = teacher @ teacher_head.T
        return of_logits(student @ head.T, goal, labels)

    return loss


@torch.no_grad()
def entropy(teacher: Tensor, teacher_head: Tensor, temperature: float, chunk: int = 128) -> float:
    """Mean entropy of the softened teacher in nats: what torchtune's KL lacks to be one."""
    total = 0.0
    for states in torch.split(teacher, chunk):
        logs = functional.log_softmax((states @ teacher_head.T).float() / temperature, -1)
        total -= float((logs.exp() * logs).sum())
    return total / len(teacher)


LOSSES: dict[str, Callable[[Asked], Loss]] = {
    "plain": plain,
    "liger": liger,
    "torchtune": torchtune,
    "trl-gkd": trl_gkd,
    "trl-tiles": trl_tiles,
}
