"""Held-out figures: those of a plain computation in float64, and those of the trainer itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import RunConfig, Student, Teacher
from engine.data import Corpus, load_corpus
from engine.device import place
from engine.heldout import Heldout, evaluate_heldout
from engine.models import CausalLM, load_student, load_teacher
from engine.stream import Eval
from tests.engine.model_fixtures import save_gpt2, save_qwen2
from tests.engine.training_rig import VOCABULARY, Desk, desk, run

__all__ = ["desk"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def corpus_of(config: RunConfig) -> Corpus:
    return load_corpus(config.data, None, sequence=config.train.sequence, rows=VOCABULARY)


def student_of(path: Path) -> CausalLM:
    return load_student(Student(path=str(path)), "cpu", 0)


def teacher_of(path: Path) -> CausalLM:
    return load_teacher(Teacher(path=str(path)), "cpu", torch.float32)


def evaluated(config: RunConfig, student: CausalLM, teacher: CausalLM | None, **options: object) -> Heldout:
    return evaluate_heldout(config, student, teacher, corpus_of(config), place(config.train), **options)  # type: ignore[arg-type]


@torch.no_grad()
def plain(windows: Tensor, student: CausalLM, teacher: CausalLM) -> tuple[float, float, float]:
    """Cross-entropy, agreement and KL over all labels, in float64 and without anything of ours but the models."""
    student.model.eval()
    inputs, labels = windows[:, :-1], windows[:, 1:]
    ours = student.model(input_ids=inputs).logits.double().log_softmax(-1)
    theirs = teacher.model(input_ids=inputs).logits[..., : ours.shape[-1]].double().log_softmax(-1)
    loss = -ours.gather(-1, labels[..., None]).mean()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return float(loss), float(agreement), float(kl)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ["one product", "whole logits", "larger teacher"])
def test_figures_are_those_of_a_plain_computation_in_float64(desk: Desk, tmp_path: Path, kind: str) -> None:
    # Temperature, weights and parts of training say nothing here.
    config = desk.config("distill.temperature=3", "distill.alpha=0.25", "data.heldout_windows=7", "train.batch=3")
    student, teacher = student_of(desk.student), teacher_of(desk.teacher)
    if kind == "whole logits":
        student = student_of(save_gpt2(tmp_path / "gpt2", vocab=VOCABULARY))
    if kind == "larger teacher":
        teacher = teacher_of(save_qwen2(tmp_path / "larger", vocab=VOCABULARY + 5, seed=3))
    windows = torch.from_numpy(corpus_of(config).heldout_batch(7))
    loss, agreement, kl = plain(windows, student, teacher)
    found = evaluated(config, student, teacher)
    assert found.loss == near(loss)
    assert found.perplexity == near(math.exp(loss))
    assert found.agreement == near(agreement)
    assert found.kl == near(kl)
    assert kl > 0.01
    assert found.tokens == 7 * config.train.sequence
    assert found.seconds > 0


def test_a_student_without_a_teacher_has_a_loss_and_no_more(desk: Desk) -> None:
    config = desk.config()
    student, teacher = student_of(desk.student), teacher_of(desk.teacher)
    alone, beside = evaluated(config, student, None), evaluated(config, student, teacher)
    assert (alone.loss, alone.tokens) == (beside.loss, beside.tokens)
    assert alone.agreement is None
    assert alone.kl is None


def test_a_model_is_its_own_perfect_student(desk: Desk) -> None:
    found = evaluated(desk.config(), student_of(desk.teacher), teacher_of(desk.teacher))
    assert found.agreement == 1.0
    assert found.kl == pytest.approx(0.0, abs=1e-6)


def test_a_loss_beyond_the_numbers_has_an_infinite_perplexity(desk: Desk) -> None:
    student = student_of(desk.student)
    with torch.no_grad():
        student.model.get_output_embeddings().weight.mul_(1e4)
    found = evaluated(desk.config(), student, None)
    assert math.isfinite(found.loss)
    assert found.perplexity == math.inf


@pytest.mark.parametrize("windows", [1, 4, 50])
def test_the_trainers_own_last_evaluation_is_found_again(desk: Desk, tmp_path: Path, windows: int) -> None:
    config = desk.config("distill.temperature=1", f"data.heldout_windows={windows}", "train.precision=fp32")
    ran = run(config, tmp_path / "run")
    first, last = ran.of(Eval)
    student = student_of(desk.student)
    before = evaluated(config, student, teacher_of(desk.teacher))
    student.model.load_state_dict(ran.weights, strict=False)
    after = evaluated(config, student, teacher_of(desk.teacher))
    for found, said in ((before, first), (after, last)):
        assert (found.loss, found.kl, found.agreement) == (said.ce, said.kd, said.agreement)
        assert found.tokens == said.tokens
    assert last.step == 6
    assert abs(before.loss - after.loss) > 1e-4


def test_progress_counts_the_windows_and_poll_can_end_it(desk: Desk) -> None:
    config = desk.config("data.heldout_windows=7", "train.batch=6", "train.accumulation=3")
    student, told = student_of(desk.student), []
    evaluated(config, student, None, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]
    told.clear()
    evaluated(config, student, None, progress=lambda done, total: told.append((done, total)), parts=1)
    assert told == [(0, 7), (6, 7), (7, 7)]

    calls = 0

    def poll() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise InterruptedError

    student.model.train()
    with pytest.raises(InterruptedError):
        evaluated(config, student, None, poll=poll)
    assert calls == 2
    assert student.model.training


def test_what_dropout_does_in_training_it_does_not_do_here(desk: Desk, tmp_path: Path) -> None:
    path = save_gpt2(tmp_path / "gpt2", vocab=VOCABULARY)
    settings = json.loads((path / "config.json").read_text())
    assert settings["resid_pdrop"] > 0
    student = student_of(path)
    assert student.model.training
    loss = evaluated(desk.config(), student, None).loss
    assert evaluated(desk.config(), student, None).loss == loss
