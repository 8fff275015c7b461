"""The coarse loss of a teacher of whom the largest logits are known, against autograd in float64."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kd_loss import IGNORE, KdLoss, fused_kd_loss, kd_loss_reference
from engine.topk_loss import TopK, fused_topk_loss, top_k_of, topk_loss_reference

VOCABULARY = 50
ROW_BYTES = 4 * VOCABULARY


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """Inputs of the loss, a pure function of the seed."""

    tokens: int = 23
    k: int = 7
    seed: int = 0
    temperature: float = 4.0
    dtype: torch.dtype = torch.float32
    ignored: str = "some"
    spread: float = 1.0
    student: Tensor = field(init=False)
    head: Tensor = field(init=False)
    logits: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=draw) * self.spread).to(self.dtype)

        self.student = normal(self.tokens, 16).requires_grad_()
        self.head = (normal(VOCABULARY, 16) / 4).requires_grad_()
        self.logits = torch.randn(self.tokens, VOCABULARY, generator=draw, dtype=torch.float64) * 2 * self.spread
        self.labels = torch.randint(VOCABULARY, (self.tokens,), generator=draw)
        if self.ignored == "all":
            self.labels[:] = IGNORE
        elif self.ignored == "some":
            self.labels[torch.rand(self.tokens, generator=draw) < 0.3] = IGNORE

    @property
    def teacher(self) -> TopK:
        return top_k_of(self.logits, self.k, self.temperature)

    def fused(self, alpha: float = 0.3, **options: Any) -> KdLoss:
        options.setdefault("chunk_bytes", 5 * ROW_BYTES)
        options.setdefault("temperature", self.temperature)
        teacher = options.pop("teacher", None) or self.teacher
        return fused_topk_loss(self.student, self.head, teacher, self.labels, alpha=alpha, **options)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        hidden, head = torch.autograd.grad(loss, (self.student, self.head))
        return hidden, head

    def expected(self, alpha: float = 0.3) -> tuple[KdLoss, tuple[Tensor, Tensor]]:
        """Loss and gradients by autograd through the reference, in float64."""
        hidden, head = (x.detach().double().requires_grad_() for x in (self.student, self.head))
        loss = topk_loss_reference(
            hidden @ head.T, self.teacher, self.labels, temperature=self.temperature, alpha=alpha
        )
        gradients = torch.autograd.grad(loss.total, (hidden, head))
        return loss, (gradients[0], gradients[1])


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance; absolute where zero is wanted."""
    error, size = (got.double() - wanted).norm().item(), wanted.norm().item()
    return error / size if size else error


def assert_agrees(case: Case, loss: KdLoss, tolerance: float, alpha: float = 0.3) -> None:
    wanted, wanted_gradients = case.expected(alpha)
    for name, got, right in zip(("total", "ce", "kd"), loss, wanted, strict=False):
        assert distance(got.detach(), right.detach()) <= tolerance, name
    assert loss.tokens == wanted.tokens
    for name, got, right in zip(("hidden", "head"), case.gradients(loss.total), wanted_gradients, strict=True):
        assert got.dtype == case.dtype
        assert distance(got, right) <= tolerance, name


def test_reference_is_the_written_formula() -> None:
    case = Case(ignored="none", dtype=torch.float64)
    student = (case.student @ case.head.T).detach()
    p, q = (case.logits / 4).softmax(1), (student / 4).softmax(1)
    ids = p.topk(7, dim=1).indices
    stored_p, stored_q = p.gather(1, ids), q.gather(1, ids)
    rest_p, rest_q = 1 - stored_p.sum(1), 1 - stored_q.sum(1)
    kd = 16 * ((stored_p * (stored_p / stored_q).log()).sum(1) + rest_p * (rest_p / rest_q).log()).mean()
    ce = -student.softmax(1)[range(23), case.labels].log().mean()
    loss = topk_loss_reference(student, case.teacher, case.labels, temperature=4.0, alpha=0.3)
    torch.testing.assert_close(torch.stack(loss[:3]), torch.stack((0.3 * ce + 0.7 * kd, ce, kd)))


def test_gradient_by_the_logits_is_the_written_one() -> None:
    """q_j - p_j where a logit is stored, q_j (1 - r) elsewhere, times T."""
    case = Case(tokens=1, ignored="none", dtype=torch.float64)
    student = (case.student @ case.head.T).detach().requires_grad_()
    topk_loss_reference(student, case.teacher, case.labels, temperature=4.0, alpha=0.0).total.backward()
    p, q = (case.logits / 4).softmax(1), (student.detach() / 4).softmax(1)
    stored = torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(7, dim=1).indices, True)
    ratio = p[~stored].sum() / q[~stored].sum()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, 4 * torch.where(stored, q - p, q * (1 - ratio)))


@pytest.mark.parametrize(("temperature", "alpha"), list(itertools.product((1.0, 2.0, 4.0), (0.0, 0.3, 1.0))))
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_gradients_equal_float64_autograd(temperature: float, alpha: float, ignored: str) -> None:
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        case = Case(ignored=ignored, dtype=dtype, temperature=temperature)
        assert_agrees(case, case.fused(alpha), tolerance, alpha)


@given(
    tokens=st.integers(0, 40),
    k=st.integers(1, VOCABULARY - 1),
    rows=st.integers(1, 50),
    temperature=st.floats(0.5, 20),
    alpha=st.floats(0, 1),
    ignored=st.sampled_from(["none", "some", "all"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_chunk_size_and_k_gives_the_same_gradients(
    tokens: int, k: int, rows: int, temperature: float, alpha: float, ignored: str, seed: int
) -> None:
    case = Case(tokens=tokens, k=k, seed=seed, ignored=ignored, dtype=torch.float64, temperature=temperature)
    assert_agrees(case, case.fused(alpha, chunk_bytes=rows * ROW_BYTES), 1e-10, alpha)


def test_with_all_logits_but_one_it_is_the_full_loss() -> None:
    case = Case(k=VOCABULARY - 1, dtype=torch.float64)
    full = kd_loss_reference(case.student @ case.head.T, case.logits, case.labels, temperature=4.0, alpha=0.3)
    coarse = case.fused()
    torch.testing.assert_close(torch.stack(coarse[:3]), torch.stack(full[:3]))
    for got, right in zip(case.gradients(coarse.total), case.gradients(full.total), strict=True):
        torch.testing.assert_close(got, right)


def test_fewer_logits_never_show_more_divergence() -> None:
    """Merging buckets cannot raise a Kullback-Leibler divergence."""
    kds = [float(Case(k=k, dtype=torch.float64).fused().kd) for k in (1, 3, 10, 30, VOCABULARY - 1)]
    assert kds == sorted(kds)
    assert kds[0] < 0.9 * kds[-1]


def test_a_student_that_is_its_teacher_has_no_kd_and_no_gradient() -> None:
    case = Case(dtype=torch.float64)
    case.logits = (case.student @ case.head.T).detach()
    loss = case.fused(0.0)
    assert abs(float(loss.kd)) < 1e-12
    assert max(float(gradient.abs().max()) for gradient in case.gradients(loss.total)) < 1e-12


@pytest.mark.parametrize("lead", [20.0, 60.0, 150.0])
def test_the_rest_is_exact_where_the_stored_logits_hold_nearly_everything(lead: float) -> None:
    """At 60 nats the rest is 1e-26: subtracted from 1 in float32 it would be zero, and its logarithm infinite."""
    case = Case(temperature=1.0, ignored="none")
    case.logits[:, :7] += lead
    with torch.no_grad():
        # A student as sure as its teacher, of the same entries.
        case.student[:, 0], case.head[:, 0], case.head[:7, 0] = lead, 0.0, 1.0
    assert float(case.teacher.log_shares(1.0, torch.float64)[:, -1].exp().max()) < math.exp(12 - lead)
    assert_agrees(case, case.fused(0.0), 1e-4, 0.0)


@pytest.mark.parametrize("lead", [60.0, 150.0])
def test_a_student_that_is_sure_of_the_wrong_thing_is_pulled_back(lead: float) -> None:
    """Its own rest is below the smallest float32: as a quotient p_rest / q_rest it would be infinite."""
    case = Case(temperature=1.0, ignored="none", k=3)
    with torch.no_grad():
        case.student[:, 0], case.head[:, 0] = lead, 0.0
        case.head[0, 0] = 2.0
    assert_agrees(case, case.fused(0.0), 1e-4, 0.0)


def test_constants_of_a_row_change_nothing() -> None:
    case = Case(dtype=torch.float64)
    ids, logits, tail = case.teacher
    shift = torch.linspace(-3, 3, case.tokens, dtype=torch.float64)
    moved = TopK(ids, logits + shift[:, None], tail + shift / case.temperature)
    torch.testing.assert_close(torch.stack(case.fused(teacher=moved)[:3]), torch.stack(case.fused()[:3]))


def test_half_precision_of_the_stored_logits_costs_little() -> None:
    case = Case()
    ids, logits, tail = case.teacher
    stored = TopK(ids.to(torch.int32), logits.half(), tail.float())
    assert_agrees(case, case.fused(teacher=stored), 1e-3)


def test_largest_logits_are_those_and_their_rest_adds_up() -> None:
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    teacher = top_k_of(logits, 6, 2.0)
    assert torch.equal(teacher.ids, logits.topk(6).indices)
    torch.testing.assert_close(teacher.logits, logits.topk(6).values - logits.amax(1, keepdim=True))
    whole = torch.logaddexp((teacher.logits / 2).logsumexp(1), teacher.tail)
    torch.testing.assert_close(whole, (logits / 2).logsumexp(1) - logits.amax(1) / 2)


def test_ignored_positions_are_never_looked_at() -> None:
    case = Case()
    wanted = case.gradients(case.fused().total)
    ids, logits, tail = case.teacher
    ignored = case.labels == IGNORE
    logits[ignored], tail[ignored] = torch.nan, torch.nan
    got = case.gradients(case.fused(teacher=TopK(ids, logits, tail)).total)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_arithmetic_gives_the_same_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for temperature, alpha in ((4.0, 0.3), (1.0, 0.0)):
            case = Case(temperature=temperature)
            assert_agrees(case, case.fused(alpha, compile=True), 3e-6, alpha)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "alpha 1.5"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"labels": torch.full((23,), VOCABULARY)}, "expected ids of 0 to 49"),
        ({"student_head": torch.zeros(VOCABULARY, 17)}, "student hidden"),
        ({"ids": torch.zeros(22, 7, dtype=torch.int64)}, r"ids \[22, 7\]"),
        ({"ids": torch.zeros(23, 7)}, "ids torch.float32"),
        ({"ids": torch.full((23, 7), VOCABULARY)}, "ids 50 to 50: expected 0 to 49"),
        ({"tail": torch.zeros(22)}, r"tail \[22\]"),
        ({"ids": torch.zeros(23, 50, dtype=torch.int64), "logits": torch.zeros(23, 50)}, "50 logits a token"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    case = Case()
    teacher = case.teacher._replace(**{name: change.pop(name) for name in TopK._fields if name in change})
    arguments: dict[str, Any] = {
        "student_hidden": case.student,
        "student_head": case.head,
        "teacher": teacher,
        "labels": case.labels,
        "temperature": 4.0,
        "alpha": 0.3,
    }
    with pytest.raises(ValueError, match=message):
        fused_topk_loss(**(arguments | dict(change)))


@pytest.mark.parametrize("k", [0, VOCABULARY])
def test_no_logit_or_all_of_them_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k {k}: expected 1 to 49"):
        top_k_of(torch.zeros(2, VOCABULARY), k, 1.0)


def test_memory_is_bounded_by_the_chunk() -> None:
    from tests.engine.test_kd_loss import LargestTensor

    case = Case(tokens=300)
    teacher = case.teacher
    with LargestTensor() as seen:
        case.fused(chunk_bytes=20 * ROW_BYTES, teacher=teacher).total.backward()
    assert seen.numel <= max(21 * VOCABULARY, case.student.numel())


def test_at_k_of_the_online_teacher_both_losses_are_close_at_a_peaked_temperature() -> None:
    case = Case(k=40, temperature=1.0, spread=2.0)
    teacher = case.logits.float()
    online = fused_kd_loss(
        case.student, case.head, teacher, torch.eye(VOCABULARY), case.labels, temperature=1.0, alpha=0.3
    )
    assert case.fused().total.item() == pytest.approx(online.total.item(), rel=1e-2)
