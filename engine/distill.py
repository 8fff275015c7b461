"""A teacher and a student together: the loss of a batch, and how alike the two are on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kd_loss import KdLoss, fused_kd_loss, kd_loss_reference
from engine.models import CausalLM


@dataclass(frozen=True)
class HeldOut:
    """Means over the labelled tokens of the held-out windows; losses in nats, agreement 0 to 1."""

    loss: float
    ce: float
    kd: float
    agreement: float | None
    cosine: float | None
    tokens: int


@dataclass(frozen=True)
class Pair:
    """Student and teacher on one device, with the loss between them.

    Args:
        student: trained.
        teacher: fixed; None where alpha is 1.
        temperature: of the distributions.
        alpha: weight of the cross-entropy.
        autocast: dtype of mixed precision, None for none.
        chunk_bytes: size of one chunk of logits in the fused loss.
        compile: whether the fused loss compiles its arithmetic.
    """

    student: CausalLM
    teacher: CausalLM | None
    temperature: float
    alpha: float
    autocast: torch.dtype | None
    chunk_bytes: int
    compile: bool

    @property
    def fused(self) -> bool:
        """Whether both heads are single matrix products, so that whole logits never need to exist."""
        return self.student.head is not None and (self.teacher is None or self.teacher.head is not None)

    def loss(self, windows: Tensor, normalizer: int) -> KdLoss:
        """Loss of one micro-batch, divided by the labelled tokens of the whole batch.

        Args:
            windows: token ids, shape [windows, sequence + 1].
            normalizer: labelled tokens of all micro-batches of the step.
        """
        inputs, labels = windows[:, :-1], windows[:, 1:].reshape(-1)
        with torch.autocast(inputs.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if not self.fused:
                return self._plain_loss(inputs, labels, normalizer)
            student, teacher = self._hidden(inputs)
        assert self.student.head is not None
        return fused_kd_loss(
            student,
            self.student.head,
            teacher,
            None if self.teacher is None else self.teacher.head,
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            normalizer=normalizer,
            chunk_bytes=self.chunk_bytes,
            compile=self.compile,
        )

    @torch.no_grad()
    def evaluate(self, windows: Tensor, batch: int, poll: Callable[[], None]) -> HeldOut:
        """Held-out losses, by the plain reference and not by the code that trains.

        Args:
            windows: token ids, shape [windows, sequence + 1].
            batch: windows taken at once.
            poll: called between batches; may raise to stop.
        """
        sums = torch.zeros(5, dtype=torch.float64)
        tokens = 0
        training = self.student.model.training
        self.student.model.eval()
        try:
            for rows in windows.split(batch):
                poll()
                for student, teacher, labels in self._logits(rows):
                    loss = kd_loss_reference(student, teacher, labels, temperature=self.temperature, alpha=self.alpha)
                    means = [loss.total, loss.ce, loss.kd]
                    if teacher is not None:
                        means.append((student.argmax(-1) == teacher.argmax(-1)).float().mean())
                        means.append(torch.nn.functional.cosine_similarity(student, teacher, dim=-1).mean())
                    weighted = torch.stack([m.detach().float() for m in means]).cpu().double() * len(labels)
                    sums[: len(means)] += weighted
                    tokens += len(labels)
        finally:
            self.student.model.train(training)
        loss_, ce, kd, agreement, cosine = (sums / max(1, tokens)).tolist()
        alone = self.teacher is None
        return HeldOut(loss_, ce, kd, None if alone else agreement, None if alone else cosine, tokens)

    def _hidden(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Last hidden states of both, shape [tokens, hidden], in one dtype: that of the head products."""
        student = self.student.hidden(inputs).flatten(0, 1)
        if self.autocast is not None:
            # Autocast leaves the residual stream in float32; the products that follow are outside of its reach.
            student = student.to(self.autocast)
        if self.teacher is None:
            return student, None
        with torch.no_grad():
            return student, self.teacher.hidden(inputs).flatten(0, 1).to(student.dtype)

    def _plain_loss(self, inputs: Tensor, labels: Tensor, normalizer: int) -> KdLoss:
        student = self.student.logits(inputs).flatten(0, 1)
        with torch.no_grad():
            teacher = None if self.teacher is None else self.teacher.logits(inputs).flatten(0, 1)
        return kd_loss_reference(
            student, teacher, labels, temperature=self.temperature, alpha=self.alpha, normalizer=normalizer
        )

    def _logits(self, windows: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Float32 logits of both with their labels, a chunk of tokens at a time; the teacher's cut to the student's."""
        inputs, labels = windows[:, :-1], windows[:, 1:].reshape(-1)
        rows = self.student.vocab
        with torch.autocast(inputs.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if not self.fused:
                student = self.student.logits(inputs).flatten(0, 1)
                teacher = None if self.teacher is None else self.teacher.logits(inputs).flatten(0, 1)
                yield student.float(), None if teacher is None else teacher[:, :rows].float(), labels
                return
            hidden, teacher_hidden = self._hidden(inputs)
        size = max(1, self.chunk_bytes // (4 * rows))
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            assert self.student.head is not None
            logits = (hidden[part] @ self.student.head.to(hidden.dtype).T).float()
            if teacher_hidden is None or self.teacher is None or self.teacher.head is None:
                yield logits, None, labels[part]
            else:
                head = self.teacher.head[:rows].to(hidden.dtype)
                yield logits, (teacher_hidden[part] @ head.T).float(), labels[part]
