"""Steps: figures read late change nothing, and one that is not finite changes no weight, nor do those after it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import Student, Teacher, Train
from engine.distill import Pair
from engine.feed import Fed
from engine.models import load_student, load_teacher
from engine.optimizer import adamw
from engine.step import Figures, Stepper
from engine.step_clock import REGIONS, StepClock
from engine.windows import Order, Windows
from tests.engine.model_fixtures import save_qwen2

CPU = torch.device("cpu")
VOCABULARY = 60
WINDOWS = Windows([np.random.default_rng(0).integers(0, VOCABULARY, 500).astype(np.uint16)], 8)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    save_qwen2(path / "teacher", vocab=VOCABULARY, hidden=48, layers=1, seed=1)
    save_qwen2(path / "student", vocab=VOCABULARY, layers=1, seed=2, tie_word_embeddings=True)
    return path


class Bench:
    """A fresh pair with its optimizer, and the steps that were made."""

    def __init__(self, root: Path, *, fused: bool = True, device: torch.device = CPU, **options: Any) -> None:
        self.student = load_student(Student(path=str(root / "student")), device, 0)
        teacher = load_teacher(Teacher(path=str(root / "teacher")), device, torch.float32)
        pair = Pair(self.student, teacher, 4.0, 0.3, None, 5 * 4 * VOCABULARY, compile=False)
        self.optimizer = adamw(self.student.model, Train(steps=10), device)
        for group in self.optimizer.param_groups:
            group["fused"] = fused
        self.stepper = Stepper(pair, self.optimizer, **{"clip": 1.0, **options})
        self.order = Order(WINDOWS, seed=1)
        self.made: list[Figures] = []
        self.number = 0

    def fed(self, mine: slice = slice(None)) -> Fed:
        indices = self.order.take(6)
        return Fed(WINDOWS.stack(indices), mine, indices, None, self.order.state)

    def step(self, rate: float = 1e-2) -> None:
        self.number += 1
        self.stepper.launch(self.number, rate, self.fed())
        self.made += self.stepper.ready()

    def finish(self) -> None:
        self.made += self.stepper.flush()

    def state(self) -> State:
        """Weights, moments and step counters."""
        found = {name: p.detach().clone() for name, p in self.student.model.named_parameters()}
        for number, slots in enumerate(self.optimizer.state.values()):
            found |= {f"{number} {name}": slot.clone() for name, slot in slots.items()}
        return found

    def break_gradient_of(self, step: int) -> None:
        """From this step on the gradient of one weight is infinite; the loss stays what it is."""
        weight = next(self.student.model.base_model.layers.parameters())
        weight.register_hook(lambda grad: grad / 0 if self.number >= step else grad)

    def break_loss_of(self, step: int) -> None:
        """From this step on the embedding gives NaN."""
        layer = self.student.model.base_model.layers[0]
        layer.register_forward_hook(lambda _, __, out: out * math.nan if self.number >= step else out)


def assert_same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def after(root: Path, steps: int, **options: Any) -> Bench:
    bench = Bench(root, **options)
    for _ in range(steps):
        bench.step()
    bench.finish()
    return bench


@pytest.mark.parametrize("lag", [1, 3, 9])
def test_figures_that_are_read_late_are_the_same_and_so_are_the_weights(root: Path, lag: int) -> None:
    prompt, late = after(root, 5, lag=0, parts=2), after(root, 5, lag=lag, parts=2)
    assert [f.step for f in late.made] == [1, 2, 3, 4, 5]
    assert late.made == prompt.made
    assert_same(late.state(), prompt.state())


def test_with_a_lag_the_newest_steps_wait_to_be_flushed(root: Path) -> None:
    bench = Bench(root, lag=2)
    for _ in range(5):
        bench.step()
    assert ([f.step for f in bench.made], bench.stepper.launched) == ([1, 2, 3], 2)
    bench.finish()
    assert ([f.step for f in bench.made], bench.stepper.launched) == ([1, 2, 3, 4, 5], 0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_and_all_after_it_change_nothing(
    root: Path, broken: str, lag: int, fused: bool
) -> None:
    before = after(root, 2, fused=fused).state()
    bench = Bench(root, lag=lag, fused=fused)
    getattr(bench, f"break_{broken}_of")(3)
    for _ in range(3 + lag):
        bench.step()
    assert [f.step for f in bench.made] == [1, 2, 3]
    assert [math.isfinite(f.loss) for f in bench.made] == [True, True, False]
    assert list(bench.stepper.flush()) == []
    assert_same(bench.state(), before)


def test_after_a_bad_step_a_good_one_changes_nothing_either(root: Path) -> None:
    bench = Bench(root, lag=5)
    bench.break_loss_of(1)
    bench.step()
    bench.number = -100  # whole again
    before = bench.state()
    bench.step()
    assert_same(bench.state(), before)
    bench.finish()
    assert [math.isfinite(f.loss) for f in bench.made] == [False]


def test_the_first_step_may_be_the_bad_one(root: Path) -> None:
    bench = Bench(root)
    before = {name: p.detach().clone() for name, p in bench.student.model.named_parameters()}
    bench.break_loss_of(1)
    bench.step()
    state = bench.state()
    assert_same({name: state[name] for name in before}, before)
    assert {float(slot.abs().max()) for name, slot in state.items() if name not in before} == {0.0}


@pytest.mark.parametrize("parts", [2, 4, 6])
def test_a_batch_in_parts_comes_to_the_same_but_for_rounding(root: Path, parts: int) -> None:
    whole, divided = after(root, 3), after(root, 3, parts=parts)
    for ours, theirs in zip(divided.made, whole.made, strict=True):
        assert (ours.loss, ours.ce, ours.kd, ours.norm) == pytest.approx(
            (theirs.loss, theirs.ce, theirs.kd, theirs.norm), rel=1e-4
        )
        assert ours.tokens == 6 * 8


def test_the_parts_of_two_devices_add_up_to_the_whole_batch(root: Path) -> None:
    figures = []
    for mine in (slice(None), slice(0, 3), slice(3, 6)):
        bench = Bench(root)
        bench.stepper.launch(1, 0.0, bench.fed(mine))
        figures += list(bench.stepper.flush())
    whole, first, second = figures
    assert first.loss + second.loss == pytest.approx(whole.loss, rel=1e-5)
    assert first.loss != pytest.approx(whole.loss, rel=0.1)
    assert whole.tokens == first.tokens == 48


def test_what_is_stored_comes_in_the_rows_of_its_micro_batch(root: Path) -> None:
    bench = Bench(root, parts=3)
    seen: list[list[int]] = []

    def loss(inputs: Tensor, labels: Tensor, tokens: int, stored: Any, clock: StepClock) -> Any:
        seen.append(stored["ids"].tolist())
        return plain(inputs, labels, tokens, None, clock)

    plain = bench.stepper.pair.loss
    object.__setattr__(bench.stepper.pair, "loss", loss)
    bench.stepper.launch(1, 0.0, replace(bench.fed(), stored={"ids": torch.arange(6)}))
    assert seen == [[0, 1], [2, 3], [4, 5]]


def test_the_clock_hears_of_every_part_of_a_step(root: Path) -> None:
    clock = StepClock(CPU)
    bench, begun = Bench(root, clock=clock, parts=2), time.perf_counter()
    for _ in range(3):
        bench.step()
    wall = time.perf_counter() - begun
    steps, seconds = clock.take()
    assert steps == 3
    assert sum(seconds.values()) <= wall
    assert [name for name in REGIONS if seconds[name] <= 0] == []
    assert clock.take() == (0, dict.fromkeys(REGIONS, 0.0))


def test_regions_stand_beside_each_other_and_have_known_names() -> None:
    clock = StepClock(CPU)
    with clock.region("data"), pytest.raises(ValueError, match="teacher inside of data"), clock.region("teacher"):
        pass
    with pytest.raises(ValueError, match="lunch"), clock.region("lunch"):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_no_part_of_a_step_waits_for_it(root: Path) -> None:
    bench = Bench(root, device=torch.device("cuda"), parts=2, clock=StepClock(torch.device("cuda")))
    bench.step()  # allocations and first calls may wait
    fed = bench.fed()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.stepper.launch(2, 1e-2, fed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bench.finish()
    assert [f.step for f in bench.made] == [1, 2]
