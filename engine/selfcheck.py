"""The numerical falsifiers: is the loss code right on the device and in the precision that will train?

A table of logits stands in for the student, so the whole check takes a fraction of a second and touches no model. It
goes through `fused_kd_loss`, the code that trains; an identity matrix as the head makes the table the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from engine.kd_loss import KdLoss, fused_kd_loss, kd_loss_reference
from engine.models import CausalLM
from engine.stream import Measure

_ROWS, _VOCABULARY = 12, 64
_LEARNING_RATE = 0.5
_STEPS = 10


class _Tables:
    """Seeded tables of logits, of a student and of a teacher, with labels."""

    def __init__(self, device: torch.device, dtype: torch.dtype, temperature: float, compile: bool) -> None:
        generator = torch.Generator().manual_seed(20150309)
        self.device, self.dtype, self.temperature, self.compile = device, dtype, temperature, compile
        self.student = self._place(torch.randn(_ROWS, _VOCABULARY, generator=generator) * 2)
        self.teacher = self._place(torch.randn(_ROWS, _VOCABULARY, generator=generator) * 2)
        self.direction = self._place(torch.randn(_ROWS, _VOCABULARY, generator=generator))
        self.labels = torch.randint(_VOCABULARY, (_ROWS,), generator=generator).to(device)
        self.head = torch.eye(_VOCABULARY, device=device, dtype=dtype)

    def _place(self, table: Tensor) -> Tensor:
        return table.to(self.device, self.dtype).float()

    def wide(self, table: Tensor) -> Tensor:
        """A copy in the widest type that the device has, for what the fused loss is held against."""
        return table.detach().to(torch.float32 if self.device.type == "mps" else torch.float64, copy=True)

    def loss(self, student: Tensor, teacher: Tensor, alpha: float) -> KdLoss:
        return fused_kd_loss(
            student.to(self.dtype),
            self.head,
            teacher.to(self.dtype),
            self.head,
            self.labels,
            temperature=self.temperature,
            alpha=alpha,
            compile=self.compile,
        )

    def gradient(self, student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
        leaf = student.clone().requires_grad_()
        self.loss(leaf, teacher, alpha).total.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return leaf.grad


def check_loss(
    device: torch.device, dtype: torch.dtype, temperature: float, *, compile: bool = False
) -> Iterator[Measure]:
    """Measures for F-DISTILL-KDSTEP-001 to 004 and F-DISTILL-STUDENT-001 and 002.

    Args:
        device: that will train.
        dtype: of the matrix products: float32, or bfloat16 under mixed precision.
        temperature: of the run.
        compile: whether the loss that trains is compiled.
    """
    tables = _Tables(device, dtype, temperature, compile)

    ours = tables.gradient(tables.student, tables.teacher, alpha=1.0)
    leaf = tables.wide(tables.student).requires_grad_()
    torch.nn.functional.cross_entropy(leaf, tables.labels).backward()  # type: ignore[no-untyped-call]
    yield Measure(
        name="ce_gradient_error", value=_relative_error(ours, leaf), detail="relative to the largest component"
    )

    same = tables.gradient(tables.teacher, tables.teacher, alpha=0.0)
    yield Measure(name="self_gradient", value=same.abs().max().item(), detail="largest component")

    ours = tables.gradient(tables.student, tables.teacher, alpha=0.0)
    leaf = tables.wide(tables.student).requires_grad_()
    reference = kd_loss_reference(leaf, tables.wide(tables.teacher), tables.labels, temperature=temperature, alpha=0.0)
    reference.total.backward()  # type: ignore[no-untyped-call]
    yield Measure(name="kd_gradient_error", value=_relative_error(ours, leaf), detail="relative, by autograd")

    with torch.no_grad():
        distances = (0.0, 0.5, 1.0, 2.0, 4.0)
        losses = [tables.loss(tables.teacher + d * tables.direction, tables.teacher, 0.0).kd.item() for d in distances]
    growth = min(far - near for near, far in pairwise(losses))
    yield Measure(name="smallest_kd_growth", value=growth, detail="nats, over distances 0 to 4")

    table = torch.zeros_like(tables.student).requires_grad_()
    optimizer = torch.optim.AdamW([table], lr=_LEARNING_RATE, weight_decay=0.0)
    preferred = tables.teacher.argmax(dim=1, keepdim=True)
    kds: list[float] = []
    for step in range(_STEPS + 1):
        optimizer.zero_grad()
        loss = tables.loss(table, tables.teacher, alpha=0.0)
        kds.append(loss.kd.item())
        if step == _STEPS:
            break
        before = table.detach().gather(1, preferred)
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step == 0:
            rise = (table.detach().gather(1, preferred) - before).min().item()
            yield Measure(name="smallest_logit_rise", value=rise, detail="of a logit, after one step")
    ratio = kds[-1] / kds[0] if kds[0] else math.nan  # a loss that begins at zero is broken, and NaN never passes
    yield Measure(name="ten_step_loss_ratio", value=ratio, detail=f"after {_STEPS} steps")


def _relative_error(ours: Tensor, leaf: Tensor) -> float:
    """Largest difference of two gradients, as a fraction of the reference's largest component."""
    assert leaf.grad is not None
    return float((ours.to(leaf.grad) - leaf.grad).abs().max() / leaf.grad.abs().max())


@torch.no_grad()
def forward_error(model: CausalLM, input_ids: Tensor, autocast: torch.dtype | None) -> float:
    """Largest difference of the trainer's logits to a plain forward pass, as a fraction of the largest plain logit.

    The trainer takes the last hidden state and multiplies it with the head itself; a scale, a cap or a norm that an
    architecture has between the two shows here.

    Args:
        model: teacher or student, on its device.
        input_ids: shape [windows, sequence].
        autocast: the trainer's autocast dtype, None for none.
    """
    training = model.model.training
    model.model.eval()
    try:
        with torch.autocast(input_ids.device.type, dtype=autocast, enabled=autocast is not None):
            if model.head is None:
                inside = model.logits(input_ids)
            else:
                hidden = model.hidden(input_ids)
                inside = hidden @ model.head.to(hidden.dtype).T
        plain = model.logits(input_ids).float()
    finally:
        model.model.train(training)
    return float((inside.float() - plain).abs().max() / plain.abs().max().clamp_min(1e-30))
