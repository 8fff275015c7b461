"""Bodies: compiled ones compute what eager ones do, keep their names, and give way where nothing can be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.bodies import Bodies, checkpoint_activations, layers_of
from engine.config import Student, Teacher
from engine.errors import ModelError
from engine.models import CausalLM, load_student, load_teacher
from tests.engine.model_fixtures import save_gpt2, save_qwen2

ROOT = Path(__file__).absolute().parents[2]
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_student(path: Path, **options: Any) -> CausalLM:
    return load_student(Student(path=str(save_qwen2(path, vocab=60, **{"layers": 2, **options}))), CPU, 0)


def ids(windows: int = 2, sequence: int = 8) -> Tensor:
    return torch.randint(60, (windows, sequence), generator=torch.Generator().manual_seed(0))


def gradients(model: CausalLM, autocast: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradients of a loss of them."""
    model.model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        hidden = model.hidden(ids())
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    return hidden.detach().float(), found


class Calls(torch.overrides.TorchFunctionMode):
    """Notes the arguments of every scaled dot product attention inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.attention.append(dict(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grown", [False, True])
def test_attention_is_torchs_own_and_gets_no_mask_that_would_keep_it_from_its_fast_kernels(
    tmp_path: Path, grown: bool
) -> None:
    model = a_student(tmp_path)
    if not grown:
        model = load_teacher(Teacher(path=str(tmp_path)), CPU, torch.float32)
    with Calls() as calls:
        model.hidden(ids())
    assert len(calls.attention) == 2
    assert all(call.get("attn_mask") is None and call["is_causal"] for call in calls.attention)


@needs_compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_compiled_bodies_compute_what_eager_ones_do_for_the_shapes_of_training_alone(
    tmp_path: Path, autocast: torch.dtype | None
) -> None:
    student = a_student(tmp_path / "student", layers=1, seed=1)
    path = save_qwen2(tmp_path / "teacher", vocab=60, hidden=48, layers=1)
    teacher = load_teacher(Teacher(path=str(path)), CPU, autocast or torch.float32)
    names = list(student.model.state_dict())
    hidden, expected = gradients(student, autocast)
    random = torch.get_rng_state()
    bodies = Bodies([student, teacher], autocast)
    assert bodies.compile([(2, 8)]) == ""
    assert torch.equal(torch.get_rng_state(), random)
    assert list(student.model.state_dict()) == names
    assert all(p.grad is None for p in student.model.parameters())
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    ours, found = gradients(student, autocast)
    tolerance = 1e-5 if autocast is None else 3e-2
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert float((ours - hidden).abs().max()) <= tolerance * float(hidden.abs().max())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * largest, name
    with bodies.eager():
        for windows in (1, 3, 5):
            student.model.eval()
            student.hidden(ids(windows))
            teacher.hidden(ids(windows, 5))
    student.model.train()
    gradients(student, autocast)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 0

    bodies.release()
    student.hidden(ids(7))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert torch.equal(gradients(student, autocast)[0], hidden)


def test_a_body_that_comes_to_something_else_compiled_stays_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def miscompile(layer: Any, **options: Any) -> None:
        layer._compiled_call_impl = lambda *args, **kwargs: 1.5 * layer._call_impl(*args, **kwargs)

    student = a_student(tmp_path)
    expected, _ = gradients(student)
    monkeypatch.setattr(torch.nn.Module, "compile", miscompile)
    # Such a stand-in knows nothing of the eager stance.
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: _without(student))
    assert "differs from its eager self by" in Bodies([student], None).compile([(2, 8)])
    assert torch.equal(gradients(student)[0], expected)


class _without:
    """Layers as they are without what was compiled."""

    def __init__(self, model: CausalLM) -> None:
        self._layers = layers_of(model)

    def __enter__(self) -> None:
        self._held = [layer._compiled_call_impl for layer in self._layers]
        for layer in self._layers:
            layer._compiled_call_impl = None

    def __exit__(self, *args: object) -> None:
        for layer, held in zip(self._layers, self._held, strict=True):
            layer._compiled_call_impl = held


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_compiler_the_bodies_stay_eager_and_say_why(tmp_path: Path) -> None:
    """In a process of its own: torch remembers the compiler that it found."""
    save_qwen2(tmp_path / "student", vocab=60, layers=1)
    code = (
        "import torch\n"
        "from engine.bodies import Bodies\n"
        "from engine.config import Student\n"
        "from engine.models import load_student\n"
        f"student = load_student(Student(path={str(tmp_path / 'student')!r}), 'cpu', 0)\n"
        "bodies, ids = Bodies([student], None), torch.arange(16).view(2, 8)\n"
        "before = student.hidden(ids)\n"
        "print('problem:', bodies.compile([(2, 8)]))\n"
        "print('same:', torch.equal(student.hidden(ids), before))\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CXX": "/nowhere/g++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("problem:", "same:"))]
    assert len(lines) == 2, done.stderr
    assert len(lines[0]) > len("problem: ")
    assert lines[1] == "same: True"


def test_layers_are_those_of_the_body_or_the_body_itself(tmp_path: Path) -> None:
    student = a_student(tmp_path)
    body = student.model.base_model
    assert layers_of(student) == list(body.layers)
    body.twice = torch.nn.ModuleList(body.layers)
    assert layers_of(student) == [body]


def test_with_activations_computed_again_hidden_states_and_gradients_are_the_same(tmp_path: Path) -> None:
    student = a_student(tmp_path)
    hidden, expected = gradients(student)
    saved = kept_elements(student)
    checkpoint_activations(student)
    again, found = gradients(student)
    assert torch.equal(again, hidden)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert kept_elements(student) < saved / 2


def test_dropout_is_drawn_the_same_when_activations_are_computed_again(tmp_path: Path) -> None:
    student = load_student(Student(path=str(save_gpt2(tmp_path, vocab=60, resid_pdrop=0.3))), CPU, 0)
    torch.manual_seed(1)
    _, expected = gradients(student)
    checkpoint_activations(student)
    torch.manual_seed(1)
    _, found = gradients(student)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def kept_elements(model: CausalLM) -> int:
    """Elements that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    weights = {p.data_ptr() for p in model.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.hidden(ids(8, 32))
    del hidden
    return sum(size for place, size in kept.items() if place not in weights)


def test_an_architecture_that_cannot_compute_layers_again_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = a_student(tmp_path)
    monkeypatch.setattr(type(student.model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"train\.activation_checkpointing: Qwen2ForCausalLM does not support"):
        checkpoint_activations(student)
