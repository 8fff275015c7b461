"""What is wrong with what a run does, the worst first."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.concerns import RECENT_STEPS, concerns
from console.run_state import RunState
from console.series import StepBuffer
from console.view import Link
from dispatch.liveness import SUPERVISOR_SECONDS, Clock, Liveness
from dispatch.manifest import Stall, SupervisorHeartbeat
from tests.console.pane_views import checkpoint, failure, verdict


def state(losses: Sequence[float] = (), **changes: object) -> RunState:
    """A run that made a step for every loss."""
    buffer = StepBuffer()
    buffer.extend([(step, step, loss, loss, loss, 1e-4, 1.0, 8, 1.0) for step, loss in enumerate(losses, 1)])
    return replace(RunState(), steps=buffer.series, **changes)


def told(run: RunState) -> list[str]:
    return [each.text for each in concerns(run)]


def test_a_run_that_does_well_gives_no_concern() -> None:
    good = (checkpoint(100), verdict("A", "PASS"), verdict("B", "PENDING"))
    assert told(RunState()) == []
    assert told(state([10 * 0.97**step + 1 for step in range(300)], checkpoints=good[:1], judged=good[1:])) == []


def test_the_worst_comes_first() -> None:
    run = state(
        [2.0] * 100 + [9.0, math.nan] + [2.0] * 50,
        checkpoints=(checkpoint(100), failure(120)),
        judged=(verdict("W", "FAIL", severity="warn"), verdict("G", "FAIL", severity="gate")),
    )
    assert told(run) == [
        "FAIL G: 5.1 at step 7",
        "loss NaN at step 102",
        "checkpoint 120 FAILED: No space left on device",
        "FAIL W: 5.1 at step 7",
        "spike 4.5x at step 101",
    ]
    assert [each.severe for each in concerns(run)] == [True, True, True, False, False]
    assert [each.verdict for each in concerns(run)] == ["G", "", "", "W", ""]


def test_what_a_verdict_tells_already_is_not_told_again() -> None:
    run = state([2.0, math.inf, math.nan], judged=(verdict("F", "FAIL", observed="inf at step 2", step=2),))
    assert told(run) == ["FAIL F: inf at step 2"]
    assert told(state([2.0, math.inf, math.nan])) == ["loss infinite at step 2 and 1 more"]


def test_a_failed_checkpoint_is_forgotten_when_a_later_one_stands() -> None:
    assert told(state(checkpoints=(failure(100), checkpoint(200)))) == []


@pytest.mark.parametrize(
    ("at", "factor", "seen"), [(11, 4.0, True), (40, 4.0, True), (900, 3.0, True), (900, 2.9, False)]
)
def test_one_step_that_stands_out_is_a_spike(at: int, factor: float, seen: bool) -> None:
    losses = [2.0] * 1_000
    losses[at - 1] *= factor
    assert told(state(losses)) == ([f"spike {factor:.3g}x at step {at:,}"] if seen else [])


def test_losses_that_fall_from_a_height_are_no_spike_and_the_highest_spike_is_told() -> None:
    losses = [2.0 + 98.0 * math.exp(-step / 30) for step in range(1_000)]
    losses[600] *= 4
    losses[800] *= 6
    assert told(state(losses)) == ["spike 6x at step 801"]


def test_a_spike_long_ago_is_left_to_the_chart() -> None:
    losses = [2.0] * (RECENT_STEPS + 200)
    losses[99] = 50.0
    assert told(state(losses)) == []


def link(stall: Stall | None = None, *, reached: bool = True, unmoved: float = 0.0) -> Link:
    """The way to a run whose supervisor said this."""
    beat = SupervisorHeartbeat(run="r", beat=1, t=0.0, phase="train", waited_seconds=720.0, stall=stall)
    fresh = Clock(1.0, 60.0)
    known = Liveness(fresh, fresh, fresh, "train", reached, beat, unmoved)
    return Link(host="gx10", status="running", liveness=known)


@pytest.mark.parametrize(
    ("process", "stacks", "text"),
    [
        ("S", True, "no progress for 12 min in phase train, says the supervisor; its stacks are in launch.log"),
        ("T", False, "no progress for 12 min in phase train, says the supervisor, it is suspended"),
        ("D", False, "no progress for 12 min in phase train, says the supervisor, it waits for a device"),
    ],
)
def test_a_stall_that_the_supervisor_saw_is_told_before_anything_else(process: str, stacks: bool, text: str) -> None:
    stall = Stall(phase="train", since=1.0, allowed_seconds=600.0, process=process, stacks=stacks)
    run = state([2.0] * 100 + [9.0], judged=(verdict("G", "FAIL", severity="gate"),))
    first, *others = concerns(run, link(stall))
    assert (first.text, first.short, first.severe) == (text, "no progress for 12 min", True)
    assert others == concerns(run)


def test_a_supervisor_that_is_gone_is_a_concern_while_it_lives_it_is_none() -> None:
    [gone] = concerns(RunState(), link(unmoved=SUPERVISOR_SECONDS + 60))
    assert gone.text == "no supervisor for 2 min: the run's end will not be recorded"
    assert concerns(RunState(), link()) == []
    assert concerns(RunState(), Link()) == []


def test_what_a_host_that_is_not_reached_once_said_is_no_concern_now() -> None:
    stall = Stall(phase="train", since=1.0, allowed_seconds=600.0)
    assert concerns(RunState(), link(stall, reached=False)) == []
    assert concerns(RunState(), link(unmoved=1e6, reached=False)) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), max_size=80))
def test_whatever_losses_a_stream_holds_something_can_be_said(losses: list[float]) -> None:
    for each in concerns(state(losses)):
        assert each.text.startswith(each.short)


def test_many_noisy_steps_cost_little() -> None:
    run = state([abs(math.sin(step * 1.7)) * 3 + 1e-9 for step in range(50_000)])
    began = time.process_time()
    concerns(run)
    assert time.process_time() - began < 0.5
