"""The schedule as a function of the step's number, and what AdamW decays."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Train
from engine.optimizer import adamw, learning_rate

TRAIN = Train(steps=1_000, warmup_steps=100, learning_rate=1e-3, min_learning_rate=1e-5)


def train(**changes: Any) -> Train:
    return msgspec.structs.replace(TRAIN, **changes)


def test_warm_up_rises_by_equal_parts_to_the_full_rate() -> None:
    rates = [learning_rate(step, TRAIN, 100) for step in range(1, 101)]
    assert rates == pytest.approx([1e-3 * step / 100 for step in range(1, 101)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decaying_schedule_ends_at_its_least_rate_and_passes_the_middle_half_way(schedule: str) -> None:
    config = train(schedule=schedule)
    assert learning_rate(550, config, 100) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(1_000, config, 100) == pytest.approx(1e-5)
    assert learning_rate(5_000, config, 100) == pytest.approx(1e-5)


def test_a_constant_schedule_stays() -> None:
    config = train(schedule="constant")
    assert {learning_rate(step, config, 100) for step in (101, 500, 1_000)} == {1e-3}


def test_a_smoke_without_warm_up_begins_at_nearly_the_full_rate() -> None:
    assert learning_rate(1, TRAIN, 0) == pytest.approx(1e-3, rel=1e-4)


@given(
    st.integers(1, 2_000),
    st.integers(1, 1_000),
    st.integers(0, 1_500),
    st.sampled_from(["cosine", "linear", "constant"]),
)
def test_no_rate_is_above_the_full_one_nor_after_warm_up_below_the_least(
    step: int, steps: int, warmup: int, schedule: str
) -> None:
    rate = learning_rate(step, train(steps=steps, schedule=schedule), warmup)
    assert 0 < rate <= 1e-3
    assert step <= warmup or rate >= 1e-5 * (1 - 1e-9)


def test_matrices_are_decayed_and_norms_and_biases_are_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = adamw(model, train(weight_decay=0.1), torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_a_frozen_parameter_is_not_trained_and_a_tied_one_stands_once() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4)
    )
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    optimizer = adamw(model, TRAIN, torch.device("cpu"))
    assert [p is model[0].weight for group in optimizer.param_groups for p in group["params"]] == [True]


def test_the_momenta_are_those_of_the_configuration() -> None:
    [group] = adamw(torch.nn.Linear(2, 2, bias=False), train(beta1=0.5, beta2=0.6), torch.device("cpu")).param_groups
    assert group["betas"] == (0.5, 0.6)
