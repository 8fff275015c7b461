"""Teacher and student together: fused and plain paths agree, and held-out figures are those of a direct computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.config import Student, Teacher
from engine.distill import Pair
from engine.kd_loss import KdLoss, fused_kd_loss
from engine.models import CausalLM, load_student, load_teacher
from engine.step_clock import StepClock
from tests.engine.model_fixtures import save_gpt2, save_qwen2

CPU = torch.device("cpu")
VOCABULARY, TEACHER_VOCABULARY = 60, 96


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Models:
    teacher: CausalLM
    larger_teacher: CausalLM
    student: CausalLM


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("pair")
    options: dict[str, Any] = {"layers": 2, "tie_word_embeddings": True}
    teacher = save_qwen2(root / "teacher", vocab=VOCABULARY, hidden=48, seed=1)
    larger = save_qwen2(root / "larger", vocab=TEACHER_VOCABULARY, hidden=48, seed=1)
    student = save_qwen2(root / "student", vocab=VOCABULARY, seed=2, **options)
    return Models(
        load_teacher(Teacher(path=str(teacher)), CPU, torch.float32),
        load_teacher(Teacher(path=str(larger)), CPU, torch.float32),
        load_student(Student(path=str(student)), CPU, 0),
    )


def pair(student: CausalLM, teacher: CausalLM | None, **changes: Any) -> Pair:
    made = Pair(
        student=student,
        teacher=teacher,
        temperature=4.0,
        alpha=0.3 if teacher else 1.0,
        autocast=None,
        chunk_bytes=5 * 4 * VOCABULARY,  # five tokens: chunks with a ragged last one
        compile=False,
    )
    return dataclasses.replace(made, **changes)


def headless(model: CausalLM) -> CausalLM:
    """The same model as if its head were more than one matrix product."""
    return dataclasses.replace(model, head=None, head_reason="a test says so")


def windows(count: int = 4, sequence: int = 8) -> Tensor:
    return torch.randint(VOCABULARY, (count, sequence + 1), generator=torch.Generator().manual_seed(0))


def loss_of(made: Pair, batch: Tensor, normalizer: int, **more: Any) -> KdLoss:
    """The loss of windows of sequence + 1 tokens."""
    return made.loss(batch[:, :-1], batch[:, 1:].reshape(-1), normalizer, **more)


def gradients(made: Pair, *micro_batches: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step over these micro-batches."""
    model = made.student.model
    model.zero_grad(set_to_none=True)
    total = 0.0
    tokens = sum(micro.shape[0] * (micro.shape[1] - 1) for micro in micro_batches)
    for micro in micro_batches:
        loss = loss_of(made, micro, tokens)
        loss.total.backward()  # type: ignore[no-untyped-call]
        total += loss.total.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    largest = max(float(gradient.abs().max()) for gradient in right.values())
    assert largest > 0
    for name, gradient in right.items():
        assert float((left[name] - gradient).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("which", ["teacher", "larger_teacher", None])
def test_fused_and_plain_paths_give_the_same_loss_and_gradients(models: Models, which: str | None) -> None:
    teacher = getattr(models, which) if which else None
    fused, plain = pair(models.student, teacher), pair(headless(models.student), teacher)
    assert (fused.fused, plain.fused) == (True, False)
    loss, gradient = gradients(fused, windows())
    plain_loss, plain_gradient = gradients(plain, windows())
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert_same(gradient, plain_gradient, 1e-5)
    for part, other in zip(loss_of(fused, windows(), 32)[1:3], loss_of(plain, windows(), 32)[1:3], strict=True):
        assert float(part) == pytest.approx(float(other), rel=1e-5)


def test_a_teacher_whose_head_is_more_than_a_product_takes_the_plain_path(models: Models) -> None:
    mixed = pair(models.student, headless(models.larger_teacher))
    assert not mixed.fused
    assert gradients(mixed, windows())[0] == pytest.approx(
        gradients(pair(models.student, models.larger_teacher), windows())[0], rel=1e-5
    )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_splitting_a_batch_changes_nothing_but_rounding(models: Models, parts: int, plain: bool) -> None:
    made = pair(headless(models.student) if plain else models.student, models.teacher)
    batch = windows(5)
    whole_loss, whole = gradients(made, batch)
    split_loss, split = gradients(made, *batch.tensor_split(parts))
    assert split_loss == pytest.approx(whole_loss, rel=1e-5)
    assert_same(split, whole, 1e-5)


def test_no_gradient_reaches_the_teacher(models: Models) -> None:
    for made in (pair(models.student, models.teacher), pair(headless(models.student), models.teacher)):
        gradients(made, windows())
        assert all(p.grad is None for p in models.teacher.model.parameters())


def test_the_kd_part_is_zero_for_a_student_that_is_its_teacher(tmp_path: Path) -> None:
    path = str(save_qwen2(tmp_path / "model", vocab=VOCABULARY))
    made = pair(load_student(Student(path=path), CPU, 0), load_teacher(Teacher(path=path), CPU, torch.float32))
    loss = loss_of(made, windows(), 32)
    assert float(loss.kd) == pytest.approx(0, abs=1e-5)
    held = made.evaluate(windows(), 2, lambda: None)
    assert held.agreement == 1.0
    assert held.cosine == pytest.approx(1.0)


def test_under_mixed_precision_the_head_products_run_in_the_short_type(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def watched(hidden: Tensor, head: Tensor, teacher: Tensor, *rest: Any, **options: Any) -> Any:
        seen.extend((hidden.dtype, teacher.dtype))
        return fused_kd_loss(hidden, head, teacher, *rest, **options)

    monkeypatch.setattr("engine.distill.fused_kd_loss", watched)
    windows = torch.randint(VOCABULARY, (2, 9))
    loss_of(pair(models.student, models.teacher, autocast=torch.bfloat16), windows, 16)
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_under_mixed_precision_the_loss_is_nearly_the_same(models: Models) -> None:
    mixed = pair(models.student, models.larger_teacher, autocast=torch.bfloat16)
    exact = pair(models.student, models.larger_teacher)
    loss, gradient = gradients(mixed, windows())
    exact_loss, exact_gradient = gradients(exact, windows())
    assert loss != exact_loss
    assert loss == pytest.approx(exact_loss, rel=0.05)
    assert_same(gradient, exact_gradient, 0.1)
    assert gradient["model.embed_tokens.weight"].dtype == torch.float32


def direct(student: CausalLM, teacher: CausalLM | None, batch: Tensor) -> dict[str, float]:
    """The held-out figures in float64 from two plain forward passes."""
    labels = batch[:, 1:].reshape(-1)
    with torch.no_grad():
        s = student.model.eval()(batch[:, :-1]).logits.flatten(0, 1).double()
        ce = float(functional.cross_entropy(s, labels))
        if teacher is None:
            return {"loss": ce, "ce": ce, "kd": 0.0}
        t = teacher.model(batch[:, :-1]).logits.flatten(0, 1).double()[:, :VOCABULARY]
    p, log_p, log_q = (t / 4).softmax(1), (t / 4).log_softmax(1), (s / 4).log_softmax(1)
    kd = float((p * (log_p - log_q)).sum(1).mean()) * 16
    return {
        "loss": 0.3 * ce + 0.7 * kd,
        "ce": ce,
        "kd": kd,
        "agreement": float((s.argmax(1) == t.argmax(1)).double().mean()),
        "cosine": float(functional.cosine_similarity(s, t).mean()),
    }


@pytest.mark.parametrize("batch", [1, 3, 5, 99])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("which", ["teacher", "larger_teacher", None])
def test_held_out_figures_are_those_of_a_direct_computation(
    models: Models, which: str | None, plain: bool, batch: int
) -> None:
    teacher = getattr(models, which) if which else None
    made = pair(headless(models.student) if plain else models.student, teacher)
    told = made.evaluate(windows(5), batch, lambda: None)
    expected = direct(models.student, teacher, windows(5))
    assert told.tokens == 40
    for name, value in expected.items():
        assert getattr(told, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert (told.agreement is None, told.cosine is None) == (teacher is None, teacher is None)


def test_an_evaluation_leaves_mode_and_gradients_as_they_were_even_when_it_is_stopped(models: Models) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    made = pair(models.student, models.teacher)
    _, before = gradients(made, windows())
    for training in (True, False):
        models.student.model.train(training)
        made.evaluate(windows(), 2, lambda: None)
        assert models.student.model.training == training
        with pytest.raises(Stopped):
            made.evaluate(windows(), 2, stop)
        assert models.student.model.training == training
    models.student.model.train()
    assert all(
        torch.equal(p.grad, before[name]) for name, p in models.student.model.named_parameters() if p.grad is not None
    )


def test_dropout_acts_in_training_and_not_in_an_evaluation(tmp_path: Path) -> None:
    path = str(save_gpt2(tmp_path / "gpt2", vocab=VOCABULARY, resid_pdrop=0.5))
    made = pair(load_student(Student(path=path), CPU, 0), None)
    assert loss_of(made, windows(), 32).ce != loss_of(made, windows(), 32).ce
    assert made.evaluate(windows(), 2, lambda: None) == made.evaluate(windows(), 2, lambda: None)


def test_the_poll_is_asked_before_every_batch(models: Models) -> None:
    asked: list[int] = []
    pair(models.student, None).evaluate(windows(5), 2, lambda: asked.append(1))
    assert len(asked) == 3


@pytest.mark.parametrize("plain", [False, True])
def test_the_clock_is_told_where_a_loss_spends_its_time(models: Models, plain: bool) -> None:
    clock = StepClock(CPU)
    made = pair(headless(models.student) if plain else models.student, models.teacher)
    loss_of(made, windows(), 32, clock=clock)
    clock.end_step()
    steps, seconds = clock.take()
    assert steps == 1
    assert {name for name, spent in seconds.items() if spent > 0} == {"teacher", "student", "loss"}


def test_a_stored_part_without_a_stored_teacher_is_refused(models: Models) -> None:
    with pytest.raises(ValueError, match="expected with a stored teacher, and only then"):
        loss_of(pair(models.student, models.teacher), windows(), 32, stored={"hidden": torch.zeros(4, 8, 48)})
