"""The numerical self-checks: they pass for the loss that trains, and each one fails for a loss broken in its way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine import selfcheck
from engine.config import Student, Teacher
from engine.contract import parse_contract
from engine.falsifiers import FAIL, PASS, Judge, builtin_contract
from engine.kd_loss import KdLoss
from engine.models import CausalLM, load_student, load_teacher
from engine.selfcheck import check_loss, forward_error
from tests.engine.model_fixtures import ModelZoo, model_zoo, save_qwen2
from tests.streams import run_event

__all__ = ["model_zoo"]

CPU = torch.device("cpu")
CHECKS = {
    "F-DISTILL-KDSTEP-001",
    "F-DISTILL-KDSTEP-002",
    "F-DISTILL-KDSTEP-003",
    "F-DISTILL-STUDENT-001",
    "F-DISTILL-STUDENT-002",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failing(dtype: torch.dtype, temperature: float = 4.0) -> set[str]:
    """Which of the five checks of the built-in contract fail."""
    judge = Judge(parse_contract(builtin_contract("smoke"), "smoke.yaml"))
    judge.observe(run_event(precision="fp32" if dtype == torch.float32 else "bf16"))
    for measure in check_loss(CPU, dtype, temperature):
        judge.observe(measure)
    verdicts = {v.id: v.verdict for v in judge.verdicts if v.id in CHECKS}
    assert set(verdicts.values()) <= {PASS, FAIL}
    assert set(verdicts) == CHECKS
    return {identifier for identifier, verdict in verdicts.items() if verdict == FAIL}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0, 4.0, 100.0])
def test_the_loss_that_trains_passes_every_check(dtype: torch.dtype, temperature: float) -> None:
    assert failing(dtype, temperature) == set()


Change = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def broken(change: Change) -> Callable[..., KdLoss]:
    """A loss by autograd in which `change` makes ce and kd of student and teacher logits, labels and temperature."""

    def loss(
        hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor, **options: float
    ) -> KdLoss:
        student, teacher = (hidden @ head.T).float(), (teacher_hidden @ teacher_head.T).float()
        ce, kd = change(student, teacher, labels, options["temperature"])
        return KdLoss(options["alpha"] * ce + (1 - options["alpha"]) * kd, ce.detach(), kd.detach(), len(labels))

    return loss


def kl(student: Tensor, teacher: Tensor, temperature: float, teachers_own: float | None = None) -> Tensor:
    log_student, log_teacher = (
        (student / temperature).log_softmax(1),
        (teacher / (teachers_own or temperature)).log_softmax(1),
    )
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


ce = functional.cross_entropy
BREAKS: dict[str, tuple[Change, set[str]]] = {
    "nothing": (lambda s, t, y, T: (ce(s, y), kl(s, t, T)), set()),
    "the KL part has no gradient": (
        lambda s, t, y, T: (ce(s, y), kl(s, t, T).detach() + 0 * s.sum()),
        {"F-DISTILL-STUDENT-001", "F-DISTILL-STUDENT-002"},
    ),
    "the KL part's gradient has the wrong sign": (
        lambda s, t, y, T: (ce(s, y), 2 * kl(s, t, T).detach() - kl(s, t, T)),
        {"F-DISTILL-STUDENT-001", "F-DISTILL-STUDENT-002"},
    ),
    "the KL part is always zero": (
        lambda s, t, y, T: (ce(s, y), 0 * kl(s, t, T)),
        {"F-DISTILL-KDSTEP-003", "F-DISTILL-STUDENT-001", "F-DISTILL-STUDENT-002"},
    ),
    "the teacher is not softened": (
        lambda s, t, y, T: (ce(s, y), kl(s, t, T, teachers_own=1.0)),
        {"F-DISTILL-KDSTEP-002", "F-DISTILL-KDSTEP-003"},
    ),
    "the KL part is a cross-entropy, which is never zero": (
        lambda s, t, y, T: (ce(s, y), -((t / T).softmax(1) * (s / T).log_softmax(1)).sum(1).mean() * T**2),
        {"F-DISTILL-STUDENT-002"},
    ),
    "the cross-entropy is 5% too large": (
        lambda s, t, y, T: (1.05 * ce(s, y), kl(s, t, T)),
        {"F-DISTILL-KDSTEP-001"},
    ),
    "the labels are one position off": (
        lambda s, t, y, T: (ce(s, y.roll(1)), kl(s, t, T)),
        {"F-DISTILL-KDSTEP-001"},
    ),
    "the two parts have each other's weight": (
        lambda s, t, y, T: (kl(s, t, T), ce(s, y)),
        {"F-DISTILL-KDSTEP-001", "F-DISTILL-KDSTEP-002", "F-DISTILL-STUDENT-001"},
    ),
    "everything is NaN": (lambda s, t, y, T: (math.nan * ce(s, y), math.nan * kl(s, t, T)), CHECKS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_loss_fails_exactly_the_checks_that_are_about_it(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, expected = BREAKS[name]
    monkeypatch.setattr(selfcheck, "fused_kd_loss", broken(change))
    assert failing(dtype) == expected


def test_every_check_is_failed_by_some_broken_loss() -> None:
    assert set().union(*(expected for _, expected in BREAKS.values())) == CHECKS


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_the_logits_inside_the_trainer_are_those_of_a_plain_pass(model_zoo: ModelZoo, architecture: str) -> None:
    probe = torch.arange(32).unsqueeze(0)
    for model in (
        load_teacher(Teacher(path=str(getattr(model_zoo, architecture))), CPU, torch.float32),
        load_student(Student(path=str(getattr(model_zoo, architecture))), CPU, 0),
    ):
        training = model.model.training
        assert forward_error(model, probe, None) <= 1e-5
        assert 0 < forward_error(model, probe, torch.bfloat16) <= 2e-2
        assert model.model.training == training


def test_a_head_that_is_not_the_models_own_shows(tmp_path: Path) -> None:
    model = load_student(Student(path=str(save_qwen2(tmp_path / "model"))), CPU, 0)
    assert model.head is not None
    probe = torch.arange(32).unsqueeze(0)
    for head in (model.head * 1.01, model.head.flip(0)):
        assert forward_error(dataclasses.replace(model, head=head.detach()), probe, None) > 1e-3
    with torch.no_grad():
        model.head[0, 0] = math.nan
    error = forward_error(model, probe, None)
    assert not error <= 2e-2


def test_a_model_without_a_head_of_its_own_is_held_against_itself(tmp_path: Path) -> None:
    model: CausalLM = load_student(Student(path=str(save_qwen2(tmp_path / "model"))), CPU, 0)
    assert forward_error(dataclasses.replace(model, head=None), torch.arange(32).unsqueeze(0), None) == 0.0
