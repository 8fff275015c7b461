"""A teacher and a student together: the loss of a batch, and how alike the two are on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kd_loss import KdLoss, fused_kd_loss, kd_loss_reference
from engine.models import CausalLM
from engine.step_clock import NO_CLOCK, StepClock
from engine.teacher_store import StoredTeacher
from engine.topk_loss import TopK, fused_topk_loss, topk_loss_reference


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
        teacher: fixed, a model or what was stored of one; None where alpha is 1.
        temperature: of the distributions.
        alpha: weight of the cross-entropy.
        autocast: dtype of mixed precision, None for none.
        chunk_bytes: size of one chunk of logits in the fused loss.
        compile: whether the fused loss compiles its arithmetic.
    """

    student: CausalLM
    teacher: CausalLM | StoredTeacher | None
    temperature: float
    alpha: float
    autocast: torch.dtype | None
    chunk_bytes: int
    compile: bool

    @property
    def fused(self) -> bool:
        """Whether both heads are single matrix products, so that whole logits never need to exist."""
        return self.student.head is not None and (self.teacher is None or self.teacher.head is not None)

    def loss(
        self,
        inputs: Tensor,
        labels: Tensor,
        normalizer: int,
        stored: Mapping[str, Tensor] | None = None,
        clock: StepClock = NO_CLOCK,
    ) -> KdLoss:
        """Loss of one micro-batch, divided by the labelled tokens of the whole batch.

        Args:
            inputs: token ids on the device, shape [windows, sequence].
            labels: next-token ids, shape [windows * sequence]; in CPU memory nothing waits for the device.
            normalizer: labelled tokens of all micro-batches of the step.
            stored: with a stored teacher its part of this micro-batch, from `StoredTeacher.read`, on the device.
            clock: told where the time goes: regions teacher, student and loss.

        Raises:
            ValueError: the teacher is a stored one and its part is missing, or the other way round.
        """
        if (stored is not None) != isinstance(self.teacher, StoredTeacher):
            raise ValueError("stored: expected with a stored teacher, and only then")
        if not self.fused:
            return self._plain_loss(inputs, labels, normalizer, stored, clock)
        with clock.region("teacher"):
            teacher = self._teacher_hidden(inputs, stored)
        with clock.region("student"):
            student = self._student_hidden(inputs)
        assert self.student.head is not None
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "alpha": self.alpha,
            "normalizer": normalizer,
            "chunk_bytes": self.chunk_bytes,
            "compile": self.compile,
        }
        with clock.region("loss"):
            if isinstance(teacher, TopK):
                return fused_topk_loss(student, self.student.head, teacher, labels, **options)
            head = None if self.teacher is None else self.teacher.head
            teacher = None if teacher is None else teacher.to(student.dtype)
            return fused_kd_loss(student, self.student.head, teacher, head, labels, **options)

    @torch.no_grad()
    def evaluate(self, windows: Tensor, batch: int, poll: Callable[[], None]) -> HeldOut:
        """Held-out losses, by the plain reference and not by the code that trains.

        Args:
            windows: token ids, shape [windows, sequence + 1].
            batch: windows taken at once.
            poll: called between batches; may raise to stop.

        Raises:
            ValueError: the teacher is a stored one, and these are not as many windows as its held-out ones.
        """
        if isinstance(self.teacher, StoredTeacher) and self.teacher.heldout_windows != len(windows):
            raise ValueError(f"{len(windows)} windows: expected the {self.teacher.heldout_windows} that are stored")
        sums = torch.zeros(5, dtype=torch.float64)
        tokens = done = 0
        training = self.student.model.training
        self.student.model.eval()
        try:
            for rows in windows.split(batch):
                poll()
                stored = None
                if isinstance(self.teacher, StoredTeacher):
                    stored = {"hidden": self.teacher.heldout(done, done + len(rows)).to(rows.device)}
                for student, teacher, labels in self._logits(rows, stored):
                    loss = kd_loss_reference(student, teacher, labels, temperature=self.temperature, alpha=self.alpha)
                    means = [loss.total, loss.ce, loss.kd]
                    if teacher is not None:
                        means.append((student.argmax(-1) == teacher.argmax(-1)).float().mean())
                        means.append(torch.nn.functional.cosine_similarity(student, teacher, dim=-1).mean())
                    weighted = torch.stack([m.detach().float() for m in means]).cpu().double() * len(labels)
                    sums[: len(means)] += weighted
                    tokens += len(labels)
                done += len(rows)
        finally:
            self.student.model.train(training)
        loss_, ce, kd, agreement, cosine = (sums / max(1, tokens)).tolist()
        alone = self.teacher is None
        return HeldOut(loss_, ce, kd, None if alone else agreement, None if alone else cosine, tokens)

    def _autocast(self, inputs: Tensor) -> torch.autocast:
        return torch.autocast(inputs.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _student_hidden(self, inputs: Tensor) -> Tensor:
        """Last hidden states, shape [tokens, width], in the dtype of the head products."""
        with self._autocast(inputs):
            hidden = self.student.hidden(inputs).flatten(0, 1)
        # Autocast leaves the residual stream in float32; the products that follow are outside of its reach.
        return hidden if self.autocast is None else hidden.to(self.autocast)

    @torch.no_grad()
    def _teacher_hidden(self, inputs: Tensor, stored: Mapping[str, Tensor] | None) -> Tensor | TopK | None:
        """What the loss needs of the teacher: hidden states, shape [tokens, width], or stored logits; None without."""
        if self.teacher is None:
            return None
        if isinstance(self.teacher, StoredTeacher):
            assert stored is not None
            flat = {name: tensor.flatten(0, 1) for name, tensor in stored.items()}
            return flat["hidden"] if "hidden" in flat else TopK(flat["ids"], flat["logits"], flat["tail"])
        with self._autocast(inputs):
            return self.teacher.hidden(inputs).flatten(0, 1)

    @torch.no_grad()
    def _teacher_logits(self, inputs: Tensor, stored: Mapping[str, Tensor] | None) -> Tensor | TopK | None:
        """The same where whole logits are made anyway: logits, shape [tokens, vocabulary]."""
        if isinstance(self.teacher, CausalLM):
            with self._autocast(inputs):
                return self.teacher.logits(inputs).flatten(0, 1)
        states = self._teacher_hidden(inputs, stored)
        if not isinstance(states, Tensor):
            return states
        assert self.teacher is not None
        assert self.teacher.head is not None
        head = self.teacher.head if self.autocast is None else self.teacher.head.to(self.autocast)
        return states.to(head.dtype) @ head.T

    def _plain_loss(
        self,
        inputs: Tensor,
        labels: Tensor,
        normalizer: int,
        stored: Mapping[str, Tensor] | None,
        clock: StepClock,
    ) -> KdLoss:
        with clock.region("teacher"):
            teacher = self._teacher_logits(inputs, stored)
        with clock.region("student"), self._autocast(inputs):
            student = self.student.logits(inputs).flatten(0, 1)
        labels = labels.to(inputs.device)
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "alpha": self.alpha,
            "normalizer": normalizer,
        }
        with clock.region("loss"):
            if isinstance(teacher, TopK):
                return topk_loss_reference(student, teacher, labels, **options)
            return kd_loss_reference(student, teacher, labels, **options)

    def _logits(
        self, windows: Tensor, stored: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Float32 logits of both with their labels, a chunk of tokens at a time; the teacher's cut to the student's."""
        inputs, labels = windows[:, :-1], windows[:, 1:].reshape(-1)
        rows = self.student.vocab
        if not self.fused:
            with self._autocast(inputs):
                student = self.student.logits(inputs).flatten(0, 1)
            teacher = self._teacher_logits(inputs, stored)
            assert not isinstance(teacher, TopK)
            yield student.float(), None if teacher is None else teacher[:, :rows].float(), labels
            return
        hidden, states = self._student_hidden(inputs), self._teacher_hidden(inputs, stored)
        assert self.student.head is not None
        assert not isinstance(states, TopK)
        size = max(1, self.chunk_bytes // (4 * rows))
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            logits = (hidden[part] @ self.student.head.to(hidden.dtype).T).float()
            if states is None or self.teacher is None or self.teacher.head is None:
                yield logits, None, labels[part]
            else:
                head = self.teacher.head[:rows].to(hidden.dtype)
                yield logits, (states[part].to(hidden.dtype) @ head.T).float(), labels[part]
