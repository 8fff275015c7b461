"""The fidelity table against a direct computation by autograd."""

from __future__ import annotations

import pytest
import torch

from engine.fidelity import FidelityTable, lines
from engine.kd_loss import kd_loss_reference
from engine.measures import fidelity_names
from engine.topk_loss import top_k_of, topk_loss_reference

TOKENS, VOCABULARY = 40, 300
PAIRS = [(t, k) for t in (1.0, 2.5, 4.0) for k in (1, 16, 64, 299)]


@pytest.mark.parametrize("spread", [1.0, 6.0, 30.0])
def test_mass_and_cosine_are_those_of_the_two_losses(spread: float) -> None:
    draw = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(TOKENS, VOCABULARY, generator=draw) * spread for _ in range(2))
    table = FidelityTable(PAIRS)
    for part in (slice(0, 13), slice(13, TOKENS)):
        table.add(student[part], teacher[part])
    rows = {(row.temperature, row.k): row for row in table.rows()}
    assert sorted(rows) == sorted(PAIRS)
    assert table.tokens == TOKENS
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    for (temperature, k), row in rows.items():
        gradients = []
        for reference, goal in (
            (kd_loss_reference, teacher.double()),
            (topk_loss_reference, top_k_of(teacher.double(), k, temperature)),
        ):
            leaf = student.double().requires_grad_()
            reference(leaf, goal, labels, temperature=temperature, alpha=0.0).total.backward()  # type: ignore[operator]
            assert leaf.grad is not None
            gradients.append(leaf.grad.flatten())
        cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)
        mass = (teacher.double() / temperature).softmax(1).topk(k).values.sum(1).mean()
        assert row.mass == pytest.approx(float(mass), abs=1e-6)
        assert row.cosine == pytest.approx(float(cosine), abs=2e-5)


def test_a_student_that_is_its_teacher_loses_nothing() -> None:
    logits = torch.randn(5, VOCABULARY)
    table = FidelityTable([(1.0, 8)])
    table.add(logits, logits)
    assert table.rows()[0].cosine == 1.0


def test_the_row_of_the_run_is_marked_and_has_its_own_names() -> None:
    table = FidelityTable([(1.0, 64), (2.5, 64)])
    table.add(torch.randn(5, VOCABULARY), torch.randn(5, VOCABULARY))
    told = lines(table.rows(), (2.5, 64))
    assert [line.endswith("<- this run") for line in told] == [False, False, True]
    assert fidelity_names(2.5, 64) == ("topk_mass_t2_5_k64", "topk_cosine_t2_5_k64")
