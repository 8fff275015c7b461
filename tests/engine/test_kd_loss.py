"""The fused distillation loss against autograd in float64, in its gradients above all."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kd_loss import IGNORE, KdLoss, fused_kd_loss, kd_loss_reference

VOCABULARY = 50
TEACHER_VOCABULARY = 61
ROW_BYTES = 4 * VOCABULARY


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on a busy machine wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """Inputs of the loss, a pure function of the seed."""

    tokens: int = 23
    seed: int = 0
    dtype: torch.dtype = torch.float32
    ignored: str = "some"
    spread: float = 1.0
    student: Tensor = field(init=False)
    student_head: Tensor = field(init=False)
    teacher: Tensor = field(init=False)
    teacher_head: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=draw) * self.spread).to(self.dtype)

        self.student = normal(self.tokens, 16).requires_grad_()
        self.student_head = (normal(VOCABULARY, 16) / 4).requires_grad_()
        self.teacher = normal(self.tokens, 24)
        self.teacher_head = normal(TEACHER_VOCABULARY, 24) / 4
        self.labels = torch.randint(VOCABULARY, (self.tokens,), generator=draw)
        if self.ignored == "all":
            self.labels[:] = IGNORE
        elif self.ignored == "some":
            self.labels[torch.rand(self.tokens, generator=draw) < 0.3] = IGNORE

    def fused(self, temperature: float = 4.0, alpha: float = 0.3, **options: Any) -> KdLoss:
        options.setdefault("chunk_bytes", 5 * ROW_BYTES)
        inputs = (self.student, self.student_head, self.teacher, self.teacher_head, self.labels)
        return fused_kd_loss(*inputs, temperature=temperature, alpha=alpha, **options)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        student, head = torch.autograd.grad(loss, (self.student, self.student_head))
        return student, head

    def expected(
        self, temperature: float = 4.0, alpha: float = 0.3, normalizer: int | None = None
    ) -> tuple[KdLoss, tuple[Tensor, Tensor]]:
        """Loss and gradients by autograd through the reference, in float64."""
        student, head = (x.detach().double().requires_grad_() for x in (self.student, self.student_head))
        teacher_logits = self.teacher.double() @ self.teacher_head.double().T
        loss = kd_loss_reference(
            student @ head.T, teacher_logits, self.labels, temperature=temperature, alpha=alpha, normalizer=normalizer
        )
        gradients = torch.autograd.grad(loss.total, (student, head))
        return loss, (gradients[0], gradients[1])


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance; absolute where zero is wanted."""
    error, size = (got.double() - wanted).norm().item(), wanted.norm().item()
    return error / size if size else error


def assert_agrees(case: Case, loss: KdLoss, tolerance: float, **options: Any) -> None:
    wanted, wanted_gradients = case.expected(**options)
    for name, got, right in zip(("total", "ce", "kd"), loss, wanted, strict=False):
        assert distance(got.detach(), right.detach()) <= tolerance, name
    assert loss.tokens == wanted.tokens
    for name, got, right in zip(("hidden", "head"), case.gradients(loss.total), wanted_gradients, strict=True):
        assert got.dtype == case.dtype
        assert distance(got, right) <= tolerance, name


SETTINGS = list(itertools.product((1.0, 2.0, 4.0), (0.0, 0.3, 1.0)))


def test_reference_is_the_written_formula() -> None:
    case = Case(ignored="none", dtype=torch.float64)
    student, teacher = (case.student @ case.student_head.T).detach(), (case.teacher @ case.teacher_head.T)
    teacher = teacher[:, :VOCABULARY]
    ce = -student.softmax(1)[range(23), case.labels].log().mean()
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    kd = 16 * (p * (p / q).log()).sum(1).mean()
    loss = kd_loss_reference(student, teacher, case.labels, temperature=4.0, alpha=0.3)
    torch.testing.assert_close(torch.stack(loss[:3]), torch.stack((0.3 * ce + 0.7 * kd, ce, kd)))


@pytest.mark.parametrize(("temperature", "alpha"), SETTINGS)
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_gradients_equal_float64_autograd(temperature: float, alpha: float, ignored: str) -> None:
    options = {"temperature": temperature, "alpha": alpha}
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-13), (torch.bfloat16, 2e-2)):
        case = Case(ignored=ignored, dtype=dtype)
        assert_agrees(case, case.fused(**options), tolerance, **options)


@given(
    tokens=st.integers(0, 40),
    rows=st.integers(1, 50),
    temperature=st.floats(0.5, 20),
    alpha=st.floats(0, 1),
    ignored=st.sampled_from(["none", "some", "all"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_chunk_size_gives_the_same_gradients(
    tokens: int, rows: int, temperature: float, alpha: float, ignored: str, seed: int
) -> None:
    case = Case(tokens=tokens, seed=seed, ignored=ignored, dtype=torch.float64)
    options = {"temperature": temperature, "alpha": alpha}
    assert_agrees(case, case.fused(chunk_bytes=rows * ROW_BYTES, **options), 1e-11, **options)


def test_gradient_has_its_kl_part() -> None:
    case = Case()
    _, wanted = case.expected(alpha=0.3)
    _, of_ce_alone = case.expected(alpha=1.0)
    for got, right, hard in zip(case.gradients(case.fused(alpha=0.3).total), wanted, of_ce_alone, strict=True):
        kl_part, kl_wanted = got.double() - 0.3 * hard, right - 0.3 * hard
        assert kl_wanted.norm() > 0.1 * hard.norm()
        assert distance(kl_part, kl_wanted) < 1e-5
    for gradient in case.gradients(case.fused(alpha=0.0).total):
        assert gradient.norm() > 0.01


def test_a_step_along_the_kl_gradient_lowers_kd() -> None:
    case = Case()
    before = case.fused(alpha=0.0)
    step, _ = case.gradients(before.total)
    case.student = (case.student.detach() - 0.1 * step / step.norm()).requires_grad_()
    assert case.fused(alpha=0.0).kd < before.kd


def test_alpha_one_is_plain_cross_entropy_and_still_reports_kd() -> None:
    case = Case()
    loss = case.fused(alpha=1.0)
    logits = case.student @ case.student_head.T
    plain = torch.nn.functional.cross_entropy(logits, case.labels, ignore_index=IGNORE)
    torch.testing.assert_close(loss.total, plain)
    for got, right in zip(case.gradients(loss.total), case.gradients(plain), strict=True):
        torch.testing.assert_close(got, right)
    assert loss.kd > 0.1


@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_identical_models_have_no_kd_and_no_gradient(temperature: float) -> None:
    case = Case(spread=3.0)
    loss = fused_kd_loss(
        case.student, case.student_head, case.student, case.student_head, case.labels, temperature=temperature, alpha=0
    )
    assert abs(loss.kd.item()) <= 1e-6 * temperature**2
    assert loss.ce > 1
    for gradient in case.gradients(loss.total):
        assert gradient.abs().max() <= 1e-7


def test_without_a_teacher_only_cross_entropy_is_left() -> None:
    case = Case()
    loss = fused_kd_loss(
        case.student, case.student_head, None, None, case.labels, temperature=4.0, alpha=1.0, chunk_bytes=5 * ROW_BYTES
    )
    wanted, gradients = case.expected(alpha=1.0)
    assert loss.kd == 0
    assert distance(loss.total.detach(), wanted.total.detach()) < 1e-6
    for got, right in zip(case.gradients(loss.total), gradients, strict=True):
        assert distance(got, right) < 3e-6
    reference = kd_loss_reference(case.student @ case.student_head.T, None, case.labels, temperature=4.0, alpha=1.0)
    torch.testing.assert_close(torch.stack(reference[:3]), torch.stack(loss[:3]))


def test_teacher_rows_beyond_the_student_count_for_nothing() -> None:
    case = Case()
    before = case.fused()
    case.teacher_head[VOCABULARY:] = 1e4
    after = case.fused()
    torch.testing.assert_close(torch.stack(before[:3]), torch.stack(after[:3]), rtol=0, atol=0)


def test_no_labelled_position_gives_zero_and_zero_gradients() -> None:
    case = Case(ignored="all")
    loss = case.fused()
    assert loss.tokens == 0
    assert [x.item() for x in loss[:3]] == [0, 0, 0]
    assert [x.abs().max().item() for x in case.gradients(loss.total)] == [0, 0]


def test_ignored_positions_are_never_multiplied() -> None:
    """A NaN in an ignored position would reach the head's gradient through any product."""
    case = Case()
    wanted = case.gradients(case.fused().total)
    ignored = case.labels == IGNORE
    with torch.no_grad():
        case.student[ignored] = torch.nan
        case.teacher[ignored] = torch.nan
    got = case.gradients(case.fused().total)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert got[0][ignored].abs().max() == 0


def test_splitting_a_batch_changes_nothing_but_rounding() -> None:
    case = Case(tokens=40)
    whole = case.fused()
    parts = []
    for span in (slice(0, 7), slice(7, 32), slice(32, 40)):
        inputs = case.student[span], case.student_head, case.teacher[span], case.teacher_head, case.labels[span]
        parts.append(fused_kd_loss(*inputs, temperature=4.0, alpha=0.3, normalizer=whole.tokens))
    assert sum(part.tokens for part in parts) == whole.tokens
    summed = [torch.stack([part[i] for part in parts]).sum() for i in range(3)]
    torch.testing.assert_close(torch.stack(summed), torch.stack(whole[:3]))
    for got, right in zip(case.gradients(summed[0]), case.gradients(whole.total), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0, 65536.0])
def test_gradients_scale_with_the_loss(factor: float) -> None:
    case = Case()
    plain = case.gradients(case.fused().total)
    for got, right in zip(case.gradients(factor * case.fused().total), plain, strict=True):
        torch.testing.assert_close(got, factor * right)


def test_tied_head_sums_both_of_its_gradients() -> None:
    case = Case(dtype=torch.float64)
    ids = torch.arange(case.tokens) % VOCABULARY

    def states() -> Tensor:
        return torch.tanh(case.student_head[ids])

    inputs = states(), case.student_head, case.teacher, case.teacher_head, case.labels
    fused = fused_kd_loss(*inputs, temperature=2.0, alpha=0.3, chunk_bytes=3 * ROW_BYTES)
    logits, teacher_logits = states() @ case.student_head.T, case.teacher @ case.teacher_head.T
    plain = kd_loss_reference(logits, teacher_logits, case.labels, temperature=2.0, alpha=0.3)
    got, right = (torch.autograd.grad(loss.total, case.student_head)[0] for loss in (fused, plain))
    torch.testing.assert_close(got, right)


def test_a_half_precision_head_gradient_is_summed_in_float32() -> None:
    """Hidden states in bfloat16 over a float32 head, as autocast has it: many small chunks must not cost digits."""
    case = Case(tokens=400, dtype=torch.bfloat16, ignored="none")
    case.student_head = case.student_head.detach().float().requires_grad_()
    inputs = case.student, case.student_head, case.teacher, case.teacher_head, case.labels

    def head_gradient(rows: int) -> Tensor:
        loss = fused_kd_loss(*inputs, temperature=4.0, alpha=0.3, chunk_bytes=rows * ROW_BYTES)
        return torch.autograd.grad(loss.total, case.student_head)[0]

    assert head_gradient(1).dtype == torch.float32
    _, (_, wanted) = case.expected()
    assert distance(head_gradient(1), wanted) < 4e-3
    assert distance(head_gradient(50), wanted) < 4e-3


def test_nothing_flows_into_the_teacher() -> None:
    case = Case()
    case.teacher.requires_grad_()
    case.teacher_head.requires_grad_()
    case.fused().total.backward()
    assert case.teacher.grad is None
    assert case.teacher_head.grad is None
    assert case.student.grad is not None


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation gives, and the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += "mm" in func.__name__
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_by_vocabulary_is_made(dtype: torch.dtype) -> None:
    case = Case(tokens=300, dtype=dtype)
    with LargestTensor() as seen:
        case.fused(chunk_bytes=20 * ROW_BYTES).total.backward()
    assert seen.numel <= max(21 * VOCABULARY, case.teacher.numel())


def test_evaluation_makes_no_gradients() -> None:
    case = Case(ignored="none")
    wanted = case.fused()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), LargestTensor() as seen:
            loss = case.fused(chunk_bytes=2**20)
        assert seen.products == 2
        assert not loss.total.requires_grad
        torch.testing.assert_close(torch.stack(loss[:3]), torch.stack(wanted[:3]).detach())


def test_only_gradients_that_are_needed_are_made() -> None:
    case = Case(ignored="none")
    wanted, _ = case.gradients(case.fused().total)
    case.student_head.requires_grad_(False)
    with LargestTensor() as seen:
        loss = case.fused(chunk_bytes=2**20)
    assert seen.products == 3
    torch.testing.assert_close(torch.autograd.grad(loss.total, case.student)[0], wanted)


def test_parts_are_detached_and_a_second_backward_is_refused() -> None:
    case = Case()
    loss = case.fused()
    assert not loss.ce.requires_grad
    assert not loss.kd.requires_grad
    loss.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran already"):
        loss.total.backward()


def test_large_logits_stay_finite() -> None:
    case = Case(spread=60.0)
    loss = case.fused(temperature=1.0)
    assert loss.ce > 100
    assert_agrees(case, loss, 1e-4, temperature=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "alpha 1.5"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"normalizer": 0}, "normalizer 0"),
        ({"chunk_bytes": 0}, "chunk_bytes 0"),
        ({"labels": torch.full((23,), VOCABULARY)}, "expected ids of 0 to 49"),
        ({"labels": torch.full((23,), -1)}, "labels -1"),
        ({"labels": torch.zeros(23)}, "expected integers"),
        ({"labels": torch.zeros(22, dtype=torch.int64)}, r"labels \[22\]"),
        ({"student_head": torch.zeros(VOCABULARY, 17)}, "student hidden"),
        ({"teacher_head": torch.zeros(VOCABULARY - 1, 24)}, "teacher vocabulary 49: expected at least .* 50"),
        ({"teacher_hidden": None}, "both or neither"),
        ({"teacher_hidden": None, "teacher_head": None}, "without a teacher"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    case = Case()
    arguments: dict[str, Any] = {
        "student_hidden": case.student,
        "student_head": case.student_head,
        "teacher_hidden": case.teacher,
        "teacher_head": case.teacher_head,
        "labels": case.labels,
        "temperature": 4.0,
        "alpha": 0.3,
    }
    with pytest.raises(ValueError, match=message):
        fused_kd_loss(**(arguments | change))


@pytest.mark.slow
def test_without_a_compiler_the_loss_runs_eagerly_and_says_so_once(tmp_path: Any) -> None:
    """In a process of its own: torch remembers the compiler that it found."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import warnings, torch\n"
        "from test_kd_loss import Case\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    losses = [torch.stack(Case().fused(compile=kind)[:3]).tolist() for kind in (True, True, False)]\n"
        "assert losses[0] == losses[1] == losses[2], losses\n"
        "print([str(w.message) for w in seen if 'torch.compile' in str(w.message)])\n"
    )
    here = os.path.dirname(__file__)
    environment = os.environ | {"CXX": str(tmp_path / "missing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    paths = [here, os.path.dirname(os.path.dirname(here))]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the loss runs without torch.compile, which failed") == 1


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_arithmetic_gives_the_same_gradients() -> None:
    case = Case()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for temperature, alpha in ((4.0, 0.3), (2.0, 0.0)):
            loss = case.fused(temperature, alpha, compile=True)
            assert_agrees(case, loss, 3e-6, temperature=temperature, alpha=alpha)
